"""The kernel of silu(gate) * up on the CPU, in Triton's interpreter.

Triton decides at import whether it interprets, so `test_silu_mul.py` runs this file in a process of
its own; pytest does not collect it by name.
"""

from __future__ import annotations

import os

import pytest
import torch

import silu_mul_cases
from padless.kernels import silu_mul
from silu_mul_cases import HALF_TYPES, SHAPES

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_silu_mul.py"

# Where a GPU rounds to the nearest bfloat16, the interpreter cuts off: twice as far.
ROUNDINGS = {torch.float16: 2, torch.bfloat16: 4}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has Triton compute on the CPU, and records the grid of every launch."""
    monkeypatch.setattr(silu_mul, "is_gpu", lambda device: True)
    monkeypatch.setattr(silu_mul, "_fault", lambda device: None)
    return silu_mul_cases.count_launches(monkeypatch)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_are_right_by_one_launch(
    shape: tuple[int, ...], dtype: torch.dtype, launches: list[tuple[int, ...]]
) -> None:
    silu_mul_cases.assert_right(shape, dtype, roundings=ROUNDINGS[dtype])
    rows = shape[0] * shape[1]
    assert launches == ([(rows, -(-shape[2] // 1024))] if rows else [])


def test_roundings_are_torch_s() -> None:
    silu_mul_cases.assert_rounded_as_torch_rounds(torch.float16)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_what_is_not_finite_stays(dtype: torch.dtype) -> None:
    silu_mul_cases.assert_what_is_not_finite_stays(dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_nothing_beside_is_written(dtype: torch.dtype) -> None:
    silu_mul_cases.assert_nothing_beside_is_written(dtype)


def test_trial_passes_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from padless.kernels import silu_mul_triton

    monkeypatch.undo()
    assert silu_mul._fault.__wrapped__(torch.device("cpu")) is None
    sound = silu_mul_triton.silu_mul
    monkeypatch.setattr(
        silu_mul_triton, "silu_mul", lambda gate, up, out: (sound(gate, up, out), out[:1].neg_())
    )
    assert "failed its trial" in str(silu_mul._fault.__wrapped__(torch.device("cpu")))
