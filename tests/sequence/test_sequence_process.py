"""`patch_llama(sequence_mesh=...)` shares out the sequences of every LLaMA of the process."""

from __future__ import annotations

import pytest

from sequence.pool import pool
from sequence.test_sequence_patch import BATCHES, _assert_same, _one_process

JOBS = "sequence.process_jobs:"


@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
def test_step_is_that_of_one_process(algorithm: str) -> None:
    batches = [BATCHES["left"], BATCHES["packed"]]
    heads = [(4, 2), (4, 2)]
    for found, *said in pool(2).run(JOBS + "steps", algorithm, batches, heads):
        for step, batch in zip(found, batches, strict=True):
            _assert_same(step, _one_process(batch))
        assert said == [f"{algorithm} over 2 ranks", {algorithm: 2}, {}]


def test_auto_looks_at_the_heads_of_each_model() -> None:
    batches, heads = [BATCHES["one long"]] * 2, [(4, 2), (2, 1)]
    for found, *said in pool(4).run(JOBS + "steps", "auto", batches, heads):
        for step, each in zip(found, heads, strict=True):
            _assert_same(step, _one_process(BATCHES["one long"], each))
        assert said == ["auto over 4 ranks", {"ulysses": 1, "ring": 1}, {}]


def test_undo() -> None:
    assert pool(2).run(JOBS + "undone", BATCHES["left"]) == [True, True]


def test_generate_runs_whole_and_says_so() -> None:
    batch = {name: x for name, x in BATCHES["left"].items() if name != "labels"}
    for before, after, is_said in pool(2).run(JOBS + "generated", batch):
        assert before.equal(after) and is_said


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no mesh", "TypeError: sequence_mesh must be a torch DeviceMesh, got int"),
        ("algorithm", "ValueError: sequence_parallel must be 'auto' or one of ulysses, ring"),
        ("second", "EngagementError: sequence_mesh must come with the first patch_llama()"),
        ("heads", "UnsupportedError: Ulysses needs a number of heads that the 4 ranks"),
        ("rope", "UnsupportedError: sequence_mesh needs a rope that depends on no other"),
        ("other batch", "ValueError: every rank of sequence_mesh must be given the same batch"),
    ],
)
def test_mistakes_are_told_in_one_sentence(kind: str, said: str) -> None:
    for message in pool(4).run(JOBS + "message", kind, BATCHES["left"]):
        assert message.startswith(said) and "\n" not in message
