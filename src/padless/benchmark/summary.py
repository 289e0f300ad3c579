"""From samples to the rows of a report: medians, rates, and what they are measured against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from padless.benchmark.clock import Ceilings
from padless.benchmark.models import Shape, step_flops
from padless.benchmark.names import UNPATCHED
from padless.benchmark.report import BenchRow
from padless.benchmark.rows import spread
from padless.benchmark.variant import Timing

_NONE_DONE = "interrupted before its first step"
Rounds = Sequence[Sequence[int]]


def floor_ms(shape: Shape, rounds: Rounds, ceilings: Ceilings, *, forward_only: bool) -> float:
    """Computes how long the work on real tokens takes at the measured ceiling: median of rounds.

    Args:
        shape: of the model.
        rounds: real tokens of each row, for each round; at least one.
        ceilings: of the device.
        forward_only: whether there is no backward.
    """
    flops = [step_flops(shape, lengths, backward=not forward_only) for lengths in rounds]
    return statistics.median(flops) / ceilings.matmul_tflops / 1e9


def summarise(
    timings: Sequence[Timing], rounds: Rounds, floor: float | None
) -> tuple[BenchRow, ...]:
    """Makes the rows of a report.

    Args:
        timings: of the variants; one without samples or reason was not reached.
        rounds: real tokens of each row, for each round.
        floor: in milliseconds.
    """
    unpatched = next((timing for timing in timings if timing.name == UNPATCHED), None)
    base = _samples(unpatched) if unpatched is not None else ()
    base_ms = statistics.median(base) if base else None
    return tuple(_row(timing, rounds, base_ms, floor) for timing in timings)


def _row(timing: Timing, rounds: Rounds, base_ms: float | None, floor: float | None) -> BenchRow:
    samples = _samples(timing)
    if timing.reason is not None or not samples:
        return BenchRow(timing.name, reason=timing.reason or _NONE_DONE)
    found = spread(list(samples))
    tokens = sum(sum(rounds[index]) for index in timing.rounds)
    kernel = timing.facts.get("kernel", "")
    return BenchRow(
        name=timing.name,
        median_ms=found["median"],
        p20_ms=found["p20"],
        p80_ms=found["p80"],
        tokens_per_s=1e3 * tokens / sum(samples),
        peak_bytes=timing.peak_bytes,
        speed_up=None if base_ms is None else base_ms / found["median"],
        floor_share=None if floor is None else floor / found["median"],
        backends=tuple(kernel.split(", ")) if kernel else (),
        left_to_stock=timing.facts.get("left_to_stock"),
        samples_ms=samples,
        rounds=tuple(timing.rounds),
    )


def _samples(timing: Timing) -> tuple[float, ...]:
    # A training step's forward is timed too, as a part of it.
    return tuple(timing.samples.get("forward_backward") or timing.samples.get("forward") or ())
