"""The ring by copies out of other ranks' memory: the same numbers as by sending."""

from __future__ import annotations

import pytest
import torch

from padless.parallel.peers import _TURNS
from sequence.pool import pool
from sequence.test_parallel_attention import HEADS, LENGTHS, assert_same, expected_of
from sequence.test_sequence_patch import BATCHES, _assert_same, _one_process

JOBS = "sequence.peer_jobs:"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_that_of_one_process(size: int, lengths: list[int]) -> None:
    arguments = (lengths, HEADS["gqa"], torch.float64, {})
    found = pool(size).run(JOBS + "by_copies", "sequence.attention_jobs:attend", "ring", *arguments)
    travels = lengths in (LENGTHS["documents"], LENGTHS["one"], LENGTHS["many"])
    for made, exchanges, sent in found:
        assert_same(made, expected_of(*arguments))
        if travels:
            # Keys go round, and back again but for the step that is kept; and so do gradients.
            assert exchanges == _TURNS + 3 * (size - 1) - 1
        assert not sent


def test_half_precision() -> None:
    arguments = (LENGTHS["many"], HEADS["gqa"], torch.bfloat16, {})
    for made, *_ in pool(2).run(
        JOBS + "by_copies", "sequence.attention_jobs:attend", "ring", *arguments
    ):
        assert_same(made, expected_of(*arguments))


@pytest.mark.parametrize("size", [2, 4])
def test_step_of_a_patched_model_is_that_of_one_process(size: int) -> None:
    batches = [BATCHES["one long"], BATCHES["packed"]]
    job = ("sequence.process_jobs:steps", "ring", batches, [(4, 2)] * 2)
    for (steps, *_), exchanges, sent in pool(size).run(JOBS + "by_copies", *job):
        for step, batch in zip(steps, batches, strict=True):
            _assert_same(step, _one_process(batch))
        assert exchanges and not sent


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_bring_what_was_shown(size: int) -> None:
    for right in pool(size).run(JOBS + "exchanges", None):
        assert right == 7 * [True]


@pytest.mark.parametrize("fault", ["no barrier in front", "no barrier behind"])
def test_each_barrier_is_needed(fault: str) -> None:
    assert not all(all(right) for right in pool(2).run(JOBS + "exchanges", fault))


@pytest.mark.parametrize("where", ["open", "numbers"])
def test_ranks_that_cannot_all_have_it_send(where: str) -> None:
    for is_refused, windows in pool(2).run(JOBS + "refused", where):
        assert is_refused and windows == 0
