"""What a new batch costs beside its work: host synchronisations, graph breaks, recompilations."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.utils import counters

import padless
from benchmarks import names
from benchmarks.record import Record, parser
from benchmarks.step_variants import TrainingStep
from padless.benchmark.batches import Batch, draw_lengths, make_batch
from padless.benchmark.models import SMOKE, Shape, sharing_copy
from padless.benchmark.variant import Timing, Variant

# Small: nothing is timed. Heads are of a size that all kernels take.
_SHAPE = Shape(1024, 8, 2, 2, 2048, 4096)
_WARMUP = 6
_SHAPES = 50


def main() -> None:
    """Counts and writes the record."""
    arguments = parser(__doc__, seconds=0).parse_args()
    record = Record("syncs", arguments)
    shape = SMOKE if record.smoke else _SHAPE
    shapes = 4 if record.smoke else _SHAPES
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    step = TrainingStep(shape, dtype, arguments.device, longest=2048)
    batches = _batches(_WARMUP + shapes, shape, record, arguments.seed)
    counted = {names.SDPA, names.FA4, names.FA4_BY_HAND, names.PADLESS, names.PADLESS_TORCH}
    timings = [
        _attempt(name, functools.partial(_count_built, build, batches, record))
        for name, build in step.builders().items()
        if name in counted
    ]
    record.add("host synchronisations a forward", timings, dtype=_short(dtype), batches=3)
    compiled = _attempt(names.PADLESS, lambda: _count_compilations(step, batches, record))
    record.add(
        f"torch.compile of the layers, {shapes} shapes",
        [compiled],
        dtype=_short(dtype),
        warmup_shapes=_WARMUP,
        shapes=shapes,
    )


def _batches(count: int, shape: Shape, record: Record, seed: int) -> list[Batch]:
    """Draws batches of different rows, widths and lengths; one in six has no padding."""
    rng = random.Random(seed)
    device = "cuda" if record.clock.is_cuda else "cpu"
    made = []
    for index in range(count):
        rows, slots = rng.randint(2, 6), rng.randint(40, 80 if record.smoke else 700)
        share = 1.0 if index % 6 == 2 else rng.uniform(0.6, 0.9)
        lengths = draw_lengths(rows, slots, share, rng)
        made.append(make_batch(lengths, slots, shape.vocab_size, rng, device))
    return made


def _attempt(name: str, count: Callable[[], dict[str, Any]]) -> Timing:
    try:
        return Timing(name, facts=count())
    except Exception as error:
        return Timing(name, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:240])


def _count_built(
    build: Callable[[], Variant], batches: list[Batch], record: Record
) -> dict[str, Any]:
    return _count_syncs(build(), batches, record)


def _count_syncs(variant: Variant, batches: list[Batch], record: Record) -> dict[str, Any]:
    """Counts how often a forward makes the host wait: the worst of three batches, after a first."""
    if not record.clock.is_cuda:
        variant.forward(variant.prepare(batches[0]))
        return {"host_syncs_a_forward": 0}
    found = []
    for batch in batches[:4]:
        inputs = variant.prepare(batch)
        with variant.context(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                variant.forward(inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchronizing" in str(warning.message) for warning in caught))
    return {"host_syncs_a_forward": max(found[1:]), "host_syncs_first_forward": found[0]}


def _count_compilations(step: TrainingStep, batches: list[Batch], record: Record) -> dict[str, Any]:
    """Trains patched, layers compiled, on batch after batch; counts what the compiler did.

    Returns:
        Graph breaks inside decoder layers in all, and graphs that were compiled before and after
        the warm-up.
    """
    torch._dynamo.reset()
    counters.clear()
    model = sharing_copy(step.model)
    handle = padless.patch(model)
    for layer in model.model.layers:
        layer.compile(backend="inductor" if record.clock.is_cuda else "aot_eager")
    graphs_warm = 0
    with _quiet():
        for index, batch in enumerate(batches):
            if index == _WARMUP:
                graphs_warm = counters["stats"]["unique_graphs"]
            model(**batch.padded()).loss.backward()
            model.zero_grad(set_to_none=True)
    report = handle.report()
    if report.stock or report.compiled_forwards != len(batches):
        raise RuntimeError(
            f"{report.compiled_forwards} of {len(batches)} forwards compiled, {report.stock}"
        )
    return {
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs_in_warmup": graphs_warm,
        "recompilations_after_warmup": counters["stats"]["unique_graphs"] - graphs_warm,
    }


def _quiet() -> AbstractContextManager[Any]:
    return warnings.catch_warnings(action="ignore")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
