"""The kernel that merges attention over keys in parts on the CPU, in Triton's interpreter.

Triton decides at import whether it interprets, so `test_merge_kernel.py` runs this file in a
process of its own; pytest does not collect it by name.
"""

from __future__ import annotations

import os

import pytest
import torch

import merge_cases
from merge_cases import CASES, DTYPES, Case
from padless.kernels import merge

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_merge_kernel.py"


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has Triton compute on the CPU, and records the grid of every launch."""
    monkeypatch.setattr(merge, "is_gpu", lambda device: True)
    monkeypatch.setattr(merge, "_fault", lambda device: None)
    return merge_cases.count_launches(monkeypatch)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_right_by_one_launch(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], launches: list[tuple[int, ...]]
) -> None:
    # Where a GPU rounds to the nearest bfloat16, the interpreter cuts off: twice as far.
    merge_cases.assert_right(case, dtypes, roundings=2 if dtypes[0] == torch.bfloat16 else 1)
    assert len(launches) == (1 if case.rows else 0)


def test_programs_are_of_several_rows(launches: list[tuple[int, ...]]) -> None:
    merge_cases.assert_right(CASES[1], DTYPES[0], roundings=2)
    assert launches == [(2 * 4,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_without_further_keys_stay(dtype: torch.dtype) -> None:
    merge_cases.assert_rows_without_further_keys_are_bit_equal(dtype)


def test_trial_passes_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from padless.kernels import merge_triton

    monkeypatch.undo()
    assert merge._fault.__wrapped__(torch.device("cpu")) is None
    sound = merge_triton.merge_rows
    for number in (0, 1):
        monkeypatch.setattr(
            merge_triton,
            "merge_rows",
            lambda *given, number=number: (sound(*given), given[number][-1:].add_(1)),
        )
        reason = merge._fault.__wrapped__(torch.device("cpu"))
        assert "failed its trial" in str(reason), number
