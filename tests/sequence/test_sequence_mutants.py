"""The checks of sequence parallelism go red for each of these faults, and stay green for none."""

from __future__ import annotations

import pytest
import torch

from sequence.pool import pool
from sequence.test_parallel_attention import HEADS, expected_of
from sequence.test_sequence_patch import BATCHES, _assert_same, _one_process

UNDER = "sequence.faults:under"


def _step_is_right(fault: str, algorithm: str) -> bool:
    batch = BATCHES["packed"]
    found = pool(2).run(UNDER, fault, "sequence.model_jobs:step", algorithm, batch)
    try:
        for each in found:
            _assert_same(each, _one_process(batch))
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("fault", "algorithm"),
    [
        ("a position at a border", "ulysses"),
        ("a position at a border", "ring"),
        ("positions from zero", "ulysses"),
        ("a label at a border dropped", "ulysses"),
        ("labels shifted behind the cut", "ulysses"),
        ("a mean of each rank", "ulysses"),
        ("no causal mask between ranks", "ring"),
        ("documents joined", "ulysses"),
        ("documents joined", "ring"),
        ("the gradient of a rank's own part", "ring"),
        ("KV heads swapped", "ulysses"),
    ],
)
def test_fault_is_seen(fault: str, algorithm: str) -> None:
    assert not _step_is_right(fault, algorithm)


@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
def test_without_a_fault(algorithm: str) -> None:
    assert _step_is_right("none", algorithm)


def test_merge_without_the_maximum_is_seen() -> None:
    arguments = ([40], HEADS["mha"], torch.float32, {}, 12.0)
    job = "sequence.attention_jobs:attend"
    fault = "a merge without the maximum"
    out = pool(2).run(UNDER, fault, job, "ring", *arguments)[0][0]
    assert not torch.allclose(out, expected_of(*arguments)[0], atol=1e-3)


def test_a_hang_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sequence.pool.LIMIT_S", 1.0)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] hang"):
        pool(2).run("time:sleep", 60)
    monkeypatch.undo()
    assert pool(2).run("math:sqrt", 4.0) == [2.0, 2.0]
