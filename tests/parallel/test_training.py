"""`Trainer` with the balanced sampler over processes: the weights of one process, and resuming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden.models import build_model
from parallel.group import Groups
from parallel.training_cases import EPOCHS, SAMPLES, sampler_of, train_alone

CASES = "parallel.training_cases"


def _assert_same_training(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    before = {n: w.detach() for n, w in build_model().named_parameters()}
    for name, weight in want.items():
        moved = float((weight - before[name]).abs().max())
        assert moved > 0, f"{name} was not trained"
        torch.testing.assert_close(
            got[name], weight, rtol=0.0, atol=1e-3 * moved, msg=lambda m, n=name: f"{n}: {m}"
        )


def _batches_of(size: int, rank: int) -> list[list[int]]:
    sampler = sampler_of(size, rank)
    made = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        made += list(sampler)
    return made


@pytest.mark.parametrize(
    ("collator", "accumulate"), [("packing", 1), ("padding", 1), ("packing", 2)]
)
def test_training_is_that_of_one_process(groups: Groups, collator: str, accumulate: int) -> None:
    name = f"{collator}-{accumulate}"
    found = groups[2].run(
        CASES, "train", collator=collator, name=name, accumulate=accumulate, limit_s=90
    )
    want = train_alone(2, accumulate)
    for rank, (weights, batches) in enumerate(found):
        _assert_same_training(weights, want)
        assert batches == _batches_of(2, rank)
    seen = sorted(i for _, batches in found for batch in batches for i in batch)
    assert seen == sorted(list(range(SAMPLES)) * EPOCHS)


def test_training_under_fsdp_is_that_of_one_process(groups: Groups) -> None:
    options: dict[str, Any] = {"collator": "packing", "name": "fsdp", "fsdp": True}
    for weights, _ in groups[2].run(CASES, "train", limit_s=90, **options):
        _assert_same_training(weights, train_alone(2))


@pytest.mark.parametrize("epoch", [0, 1])
def test_training_resumes_in_the_middle_of_an_epoch(groups: Groups, epoch: int) -> None:
    options: dict[str, Any] = {"collator": "packing", "name": f"resume-{epoch}"}
    whole = groups[2].run(CASES, "train", limit_s=90, **options)
    done = len(sampler_of(2, 0)) * epoch + 2
    again = groups[2].run(CASES, "train", limit_s=90, resume=done, **options)
    for rank in range(2):
        # accelerate collates what it skips or does not; what is trained on are the last ones.
        rest = whole[rank][1][done:]
        assert again[rank][1][-len(rest) :] == rest
        _assert_same_training(again[rank][0], whole[rank][0])


def test_normalisation_by_each_rank_is_seen(groups: Groups) -> None:
    options: dict[str, Any] = {"collator": "packing", "name": "local", "global_count": False}
    found = groups[2].run(CASES, "train", limit_s=90, **options)
    with pytest.raises(AssertionError):
        _assert_same_training(found[0][0], train_alone(2))
