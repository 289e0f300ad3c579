"""A patched model under the engines that spread a model or its batches over processes.

Truth is the step of one process on the global batch in float64; the stock model under the same
engine is the baseline of the error.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from golden.models import LAYERS, build_model, judge
from golden.steps import Step, truth_step
from parallel.engine_cases import ROWS, RankStep, global_batch
from parallel.engines import ENGINES
from parallel.group import CaseError, Groups

CASES = "parallel.engine_cases"
DATA_PARALLEL = [name for name in ENGINES if name.startswith(("ddp", "fsdp"))]


@functools.cache
def truth_of(size: int, kind: str) -> Step:
    ids, real, labels = global_batch(size, kind)
    kept = real.any(1)
    return truth_step(build_model(), ids[kept], real[kept], labels[kept])


def _check(
    groups: Groups,
    engine: str,
    *,
    size: int = 2,
    kind: str = "uneven",
    when: str = "before",
    baseline: str | None = None,
) -> None:
    shares_batch = ENGINES[engine][1]
    options = {"engine": engine, "kind": kind, "when": when, "baseline": baseline}
    found = groups[size].run(CASES, "step", **options)
    stock, got = [pair[0] for pair in found], [pair[1] for pair in found]
    truth = truth_of(size, kind)
    _, real, _ = global_batch(size, kind)
    judge("loss", _loss(got, shares_batch), _loss(stock, shares_batch), truth.loss[None])
    for rank in range(size):
        for name, expected in truth.gradients.items():
            judge(
                f"gradient of {name} on rank {rank}",
                got[rank].gradients[name], stock[rank].gradients[name], expected,
            )  # fmt: skip
        assert got[rank].gradients.keys() == truth.gradients.keys()
    logits = torch.cat([each.logits for each in (got[:1] if shares_batch else got)])
    plain = torch.cat([each.logits for each in (stock[:1] if shares_batch else stock)])
    judge("logits", logits[real], plain[real], truth.logits[real[real.any(1)]])
    for rank, each in enumerate(got):
        is_empty = not shares_batch and not real[ROWS * rank : ROWS * (rank + 1)].any()
        if is_empty:
            assert each.stock == {"a batch without a real token": 1}
        else:
            assert (each.forwards, each.stock, each.layers) == (1, {}, LAYERS)


def _loss(steps: list[RankStep], shares_batch: bool) -> Any:
    losses = torch.stack([each.loss for each in steps])
    return losses[:1] if shares_batch else losses.sum()[None]


@pytest.mark.parametrize("when", ["before", "after", "process"])
@pytest.mark.parametrize("engine", DATA_PARALLEL)
def test_data_parallel_step_is_that_of_one_process(groups: Groups, engine: str, when: str) -> None:
    _check(groups, engine, when=when)


@pytest.mark.parametrize("engine", DATA_PARALLEL)
def test_rank_without_a_real_token_does_not_hang_the_others(groups: Groups, engine: str) -> None:
    _check(groups, engine, kind="empty")


@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp2", "fsdp2, bfloat16", "fsdp2, bfloat16, body", "fsdp1, bfloat16"]
)
def test_packed_rows_with_a_layout(groups: Groups, engine: str) -> None:
    _check(groups, engine, kind="packed")


@pytest.mark.parametrize(("engine", "kind"), [("ddp", "left"), ("fsdp2", "empty")])
def test_four_processes(groups: Groups, engine: str, kind: str) -> None:
    _check(groups, engine, size=4, kind=kind)


@pytest.mark.parametrize("kind", ["uneven", "left"])
@pytest.mark.parametrize(
    ("engine", "when"),
    [
        ("tensor parallel, torch", "before"),
        ("tensor parallel, torch", "after"),
        ("tensor parallel, transformers", "after"),
        ("tensor parallel, transformers", "process"),
    ],
)
def test_tensor_parallel_step_is_that_of_one_process(
    groups: Groups, engine: str, when: str, kind: str
) -> None:
    _check(groups, engine, when=when, kind=kind)


@pytest.mark.requires("deepspeed")
@pytest.mark.parametrize("when", ["before", "after", "process"])
@pytest.mark.parametrize("kind", ["left", "empty"])
@pytest.mark.parametrize("engine", ["deepspeed, zero 2", "deepspeed, zero 3"])
def test_deepspeed_step_is_that_of_one_process(
    groups: Groups, engine: str, kind: str, when: str
) -> None:
    _check(groups, engine, kind=kind, when=when)


def test_local_normalisation_is_seen(groups: Groups) -> None:
    with pytest.raises(AssertionError, match="over budget"):
        _check(groups, "fault: local count", baseline="ddp")


def test_collective_that_depends_on_the_count_is_seen(groups: Groups) -> None:
    with pytest.raises(CaseError, match="did not come back"):
        options = {"engine": "fault: collective by count", "kind": "uneven", "when": "before"}
        groups[2].run(CASES, "step", limit_s=5, **options)
