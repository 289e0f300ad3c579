"""The order in which requests are needed, and a budget of nothing and of everything."""

from __future__ import annotations

import math

import pytest

from padless.diagnosis.need import (
    REQUESTS,
    Budget,
    Usual,
    in_order_of_need,
    most_needed,
    usual_dtype,
)


@pytest.mark.parametrize(
    "device, capability, dtype",
    [
        ("cpu", None, "float32"),
        ("cuda:0", "9.0", "bfloat16"),
        ("cuda:0", "10.0", "bfloat16"),
        ("cuda:1", "8.0", "bfloat16"),
        ("cuda:0", "7.5", "float16"),
        ("cuda:0", None, "bfloat16"),
    ],
)
def test_the_usual_dtype(device: str, capability: str | None, dtype: str) -> None:
    assert usual_dtype(device, capability) == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_order_of_need_has_every_request_once(dtype: str) -> None:
    order = [REQUESTS[number] for number in in_order_of_need(dtype)]
    assert sorted(order) == sorted(REQUESTS)
    assert tuple(order[:2]) == most_needed(dtype)
    assert {usual.dtype for usual in order[:6]} == {dtype}
    assert order[0] == Usual("llama3-8b", dtype, True)


def test_a_budget_of_nothing_allows_nothing() -> None:
    for needed in (True, False):
        assert not Budget(0.0).allows(needed, 0.0)
        assert Budget(math.inf).allows(needed, 1e9)
