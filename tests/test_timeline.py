"""What overlaps with what in a trace, by arithmetic alone."""

from __future__ import annotations

import pytest
from benchmarks.timeline import (
    Timeline,
    behind_mark,
    joined,
    overlap,
    record_timeline,
    sort_kernels,
)


def test_kernels_are_told_apart_and_joined() -> None:
    found = sort_kernels(
        [
            ("flash_fwd", 10.0, 20.0),
            ("ncclDevKernel_SendRecv(ncclDevKernelArgs)", 12.0, 15.0),
            ("elementwise", 18.0, 25.0),
            ("ncclDevKernel_AllGather", 30.0, 40.0),
            ("gemm", 38.0, 39.0),
        ]
    )
    assert found.communication == [(12.0, 15.0), (30.0, 40.0)]
    assert found.computation == [(10.0, 25.0), (38.0, 39.0)]
    assert found.hidden == pytest.approx((3 + 1) / 13)
    facts = found.as_facts()
    assert facts["communication"] == [[2.0, 5.0], [20.0, 30.0]]
    assert facts["computation"] == [[0.0, 15.0], [28.0, 29.0]]
    assert facts["communication_hidden"] == found.hidden


@pytest.mark.parametrize(
    "stretches, want",
    [
        ([], []),
        ([(3.0, 4.0), (1.0, 2.0)], [(1.0, 2.0), (3.0, 4.0)]),
        ([(1.0, 5.0), (2.0, 3.0), (4.0, 6.0), (6.0, 7.0)], [(1.0, 7.0)]),
    ],
)
def test_stretches_that_touch_are_one(stretches: list, want: list) -> None:
    assert joined(stretches) == want


def test_overlap_is_where_both_are() -> None:
    assert overlap([(0.0, 4.0), (6.0, 9.0)], [(3.0, 7.0), (8.0, 12.0)]) == [
        (3.0, 4.0),
        (6.0, 7.0),
        (8.0, 9.0),
    ]
    assert overlap([(0.0, 1.0)], [(1.0, 2.0)]) == []
    assert Timeline([], [(0.0, 1.0)]).hidden is None


def test_what_runs_before_the_turn_is_left_out() -> None:
    turn = [("flash_fwd", 9.0, 20.0), ("ncclDevKernel_SendRecv", 8.0, 15.0)]
    lead = [("fill", 0.0, 4.0), ("fill", 4.0, 7.0), ("at::cuda::spin_kernel(long)", 7.0, 8.0)]
    assert behind_mark([turn[0], *lead, turn[1]]) == turn
    assert behind_mark(turn) == turn


def test_without_a_gpu_there_is_no_timeline_but_the_turn_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runs: list[int] = []
    assert record_timeline(lambda: runs.append(1)) is None and runs == [1]
