"""The kernel that rotates and keeps a decoding step on the CPU, in Triton's interpreter.

Triton decides at import whether it interprets, so `test_rotary_keep.py` runs this file in a process
of its own; pytest does not collect it by name.
"""

from __future__ import annotations

import os

import pytest
import torch

import rotary_keep_cases
from padless.kernels import rotary_keep
from rotary_keep_cases import SHAPES, inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_rotary_keep.py"

# Where a GPU rounds to the nearest bfloat16, the interpreter cuts off.
DTYPES = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2}


@pytest.mark.parametrize("tables", [None, torch.float32], ids=["tables", "float32-tables"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_are_the_twin_s(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tables: torch.dtype | None
) -> None:
    rotary_keep_cases.assert_right(shape, dtype, tables=tables, roundings=DTYPES[dtype])


def test_the_choice_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_keep, "is_gpu", lambda device: True)
    given = inputs(SHAPES[2], torch.float32)
    want = rotary_keep_cases.twin(given)
    with torch.no_grad():
        assert rotary_keep.rotate_and_keep(*given)
    torch.testing.assert_close(given[0], want[0])
    torch.testing.assert_close(given[5], want[1])


def test_trial_passes_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from padless.kernels import rotary_keep_triton

    assert rotary_keep._fault.__wrapped__(torch.device("cpu")) is None
    sound = rotary_keep_triton.rotate_and_keep
    for number in (0, 5, 6):
        monkeypatch.setattr(
            rotary_keep_triton,
            "rotate_and_keep",
            lambda *given, number=number: (sound(*given), given[number][-1:].add_(1)),
        )
        reason = rotary_keep._fault.__wrapped__(torch.device("cpu"))
        assert "failed its trial" in str(reason), number


def test_no_rows_are_nothing() -> None:
    from padless.kernels.rotary_keep_triton import rotate_and_keep

    rotate_and_keep(*inputs((0, 2, 1, 8), torch.float32))
