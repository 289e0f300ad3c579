"""The checks of `test_dense_lse` go red for each of these faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import Case
from padless.backends import dense_lse
from test_dense_lse import check


def _without_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._forward
    monkeypatch.setattr(
        dense_lse, "_forward", lambda q, k, v, causal, scale: inner(q, k, v, causal, 1.0)
    )


def _in_base_two(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._forward

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = inner(*arguments)
        return out, lse / 0.6931471805599453

    monkeypatch.setattr(dense_lse, "_forward", forward)


def _lse_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._backward

    def backward(inputs: Any, own: Any, lse: Tensor, *rest: Any) -> Any:
        return inner(inputs, own, dense_lse._forward(*inputs, *rest)[1].contiguous(), *rest)

    monkeypatch.setattr(dense_lse, "_backward", backward)


def _out_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._backward

    def backward(inputs: Any, own: Any, lse: Tensor, *rest: Any) -> Any:
        return inner(inputs, (dense_lse._forward(*inputs, *rest)[0], own[1]), lse, *rest)

    monkeypatch.setattr(dense_lse, "_backward", backward)


def _groups_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._Part.take

    def take(self: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v = inner(self, *inputs)
        return q, k.flip(1), v.flip(1)

    monkeypatch.setattr(dense_lse._Part, "take", take)


def _causal_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dense_lse._forward
    monkeypatch.setattr(
        dense_lse, "_forward", lambda q, k, v, causal, scale: inner(q, k, v, False, scale)
    )


@pytest.mark.parametrize(
    "plant",
    [
        _without_the_scale,
        _in_base_two,
        _lse_of_the_part,
        _out_of_the_part,
        _groups_swapped,
        _causal_forgotten,
    ],
)
def test_faults_are_seen(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("ragged_gqa", (5, 1, 0, 17, 33))
    check(case, torch.float32)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, torch.float32)
