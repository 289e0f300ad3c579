"""What each rank of a pool does for the tests of `patch_llama(sequence_mesh=...)`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import padless
from sequence.attention_jobs import mesh
from sequence.model_jobs import Step, average, model_of, step_of


def steps(
    algorithm: str, batches: list[dict[str, Tensor]], heads: list[tuple[int, int]]
) -> tuple[list[Step], str | None, dict[str, int], dict[str, int]]:
    """A step of each of some models, the first built before the patch of the process."""
    first = model_of(heads[0])
    with padless.patch_llama(sequence_mesh=mesh(), sequence_parallel=algorithm) as handle:
        models = [first, *(model_of(each) for each in heads[1:])]
        found = [
            average(step_of(model, batch, reads_logits=True))
            for model, batch in zip(models, batches, strict=True)
        ]
        report = handle.report()
    return found, report.sequence_parallel, report.shared, report.stock | report.whole


def undone(batch: dict[str, Tensor]) -> bool:
    """Whether a model computes the whole again after the undo."""
    model = model_of()
    before = step_of(model, batch, reads_logits=True)
    padless.patch_llama(sequence_mesh=mesh()).undo()
    after = step_of(model, batch, reads_logits=True)
    return torch.equal(before["logits"], after["logits"])


def generated(batch: dict[str, Tensor]) -> Any:
    """Tokens of generate, before and under the patch, and whether something was said of it."""
    model = model_of().eval()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**batch, **options)
    with padless.patch_llama(sequence_mesh=mesh()) as handle:
        after = model.generate(**batch, **options)
        report = handle.report()
    return before, after, bool(report.whole or report.generations)


def message(kind: str, batch: dict[str, Tensor]) -> str:
    """What is said of a mistake, and that the process is as it was then."""
    options: dict[str, Any] = {"sequence_mesh": mesh()}
    handle = None
    try:
        if kind == "no mesh":
            options["sequence_mesh"] = 2
        elif kind == "algorithm":
            options["sequence_parallel"] = "zigzag"
        elif kind == "heads":
            options["sequence_parallel"] = "ulysses"
        elif kind == "second":
            handle = padless.patch_llama()
        handle = padless.patch_llama(**options)
        if kind == "heads":
            model_of((2, 1))(**batch)
        elif kind == "rope":
            scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            model_of(rope_scaling=scaling)(**batch)
        elif kind == "other batch":
            # Compared for each model, and not for the first alone.
            model_of()(**batch)
            model_of()(**{**batch, "input_ids": batch["input_ids"] + dist.get_rank()})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if handle is not None:
            handle.undo()
    return "nothing"
