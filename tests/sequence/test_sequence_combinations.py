"""Shared sequences together with LoRA, checkpointing, compilers, autocast, FSDP2 and generate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from golden.steps import IGNORED
from sequence.combination_jobs import alone
from sequence.model_jobs import model_of, own_loss
from sequence.pool import pool
from sequence.test_sequence_patch import BATCHES, _assert_same, _one_process

JOBS = "sequence.combination_jobs:"
ALGORITHMS = ["ulysses", "ring"]
COMBINATIONS = [
    *itertools.product(["LoRA"], ["before", "after"], ALGORITHMS),
    *itertools.product(["LoRA, checkpointing"], ["after"], ALGORITHMS),
    *itertools.product(["LoRA, reentrant checkpointing"], ["after"], ALGORITHMS),
    *itertools.product(["autocast"], ["after"], ALGORITHMS),
    # Seconds each, and the compiler sees nothing of either algorithm.
    ("compiled layers", "before", "ring"),
    ("compiled for any length", "after", "ulysses"),
]


@pytest.mark.parametrize(("kind", "when", "algorithm"), COMBINATIONS)
def test_step_is_that_of_one_process(kind: str, when: str, algorithm: str) -> None:
    batch = BATCHES["left"]
    expected = alone(kind, batch)
    # Rounded to bfloat16 at other places, which is a hundredth of the largest gradient.
    exact = 3e-2 if kind == "autocast" else 1e-6
    steps = 2 if kind == "compiled for any length" else 1
    for each in pool(2).run(JOBS + "shared", kind, algorithm, when, batch):
        assert (each["forwards"], each["left"]) == (steps, {})
        assert each.get("graphs", 1) > 0
        _assert_same(each, expected, exact)
    if kind.startswith("LoRA"):
        assert all("lora_" in name for name in expected["gradients"])


@pytest.mark.parametrize("fault", ["a position at a border", "a label at a border dropped"])
@pytest.mark.parametrize("kind", ["LoRA", "autocast"])
def test_fault_is_seen(kind: str, fault: str) -> None:
    batch = BATCHES["packed"]
    job = JOBS + "shared"
    found = pool(2).run("sequence.faults:under", fault, job, kind, "ulysses", "after", batch)
    with pytest.raises(AssertionError):
        for each in found:
            _assert_same(each, alone(kind, batch), 3e-2 if kind == "autocast" else 1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wrapper", ["fsdp data", "fsdp both"])
def test_weights_sharded_over_data_alone(wrapper: str, algorithm: str) -> None:
    batches = [BATCHES["left"], BATCHES["packed"]]
    steps = [_one_process(batch)["gradients"] for batch in batches]
    expected = {name: (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    for each in pool(4).run(JOBS + "wrapped", algorithm, batches, wrapper, None):
        _assert_same({"gradients": each}, {"gradients": expected})


@pytest.mark.parametrize(
    ("algorithm", "when", "options"),
    [
        ("ulysses", "before", {}),
        ("ring", "after", {}),
        ("ring", "before", {"output_dtype": torch.float64}),
    ],
)
def test_fsdp_does_not_collect_logits_that_nobody_reads(
    algorithm: str, when: str, options: dict[str, Any]
) -> None:
    batch = BATCHES["left"]
    expected = _one_process(batch)
    for each in pool(2).run(JOBS + "fsdp_step", algorithm, when, batch, options, False):
        assert (each["collected"], each["hooks"]) == ((0, 1), 1)
        _assert_same(each, expected)


def test_fsdp_goes_back_from_logits_that_are_read() -> None:
    batch = BATCHES["left"]
    model = model_of()
    own_loss(model(**batch).logits, batch).backward()
    expected = {"gradients": {n: p.grad for n, p in model.named_parameters()}}
    for each in pool(2).run(JOBS + "fsdp_step", "ulysses", "after", batch, {}, True):
        assert each["collected"] == (0, 1)
        _assert_same({"gradients": each["gradients"]}, expected, 1e-12)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp both"])
def test_loss_normalised_over_all_data_ranks(wrapper: str) -> None:
    batches = [BATCHES["left"], BATCHES["right"]]
    items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    found = [_one_process({**batch, "num_items_in_batch": items}) for batch in batches]
    steps = [each["gradients"] for each in found]
    expected = {name: steps[0][name] + steps[1][name] for name in steps[0]}
    for each in pool(4).run(JOBS + "wrapped", "ulysses", batches, wrapper, items):
        _assert_same({"gradients": each}, {"gradients": expected})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("when", ["alone", "between steps"])
def test_generate(when: str, algorithm: str) -> None:
    batch = {name: x for name, x in BATCHES["left"].items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 4}
    for before, after, is_same, is_said in pool(2).run(
        JOBS + "generated", algorithm, when, batch, options
    ):
        assert before.equal(after) and is_same and is_said
