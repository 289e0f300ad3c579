"""The turns of a variant before it is timed: kernels are compiled in them, plans are made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from padless.benchmark.clock import Clock
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.turn import Turn, read, take
from padless.benchmark.variant import Variant


class TooSlowError(Exception):
    """A variant's warm-up takes longer than it may."""


def warm_up(
    turn: Turn,
    build: Callable[[], Variant],
    clock: Clock,
    draw: Callable[[int], Any],
    *,
    turns: int,
    repeats: int = 1,
    inference: bool = False,
    limit_s: float = math.inf,
) -> float:
    """Builds a variant and takes its first turns, or notes why not and closes it.

    Args:
        turn: the variant's.
        build: makes it; whatever it raises is the reason.
        clock: of the device.
        draw: makes the batch of a turn's number.
        turns: to take; the first is checked, the last tells how long one takes.
        repeats: times that each batch is computed.
        inference: whether "forward" is timed by itself.
        limit_s: behind which no further turn is taken and the variant given up. What runs is never
            cut off: compilers and kernels would be left in the middle of something.

    Returns:
        The seconds that it took.
    """
    timing, start = turn.timing, time.perf_counter()
    try:
        turn.variant = build()
        timing.facts.update(turn.variant.facts)
        for index in range(turns):
            elapsed = time.perf_counter() - start
            if elapsed > limit_s:
                raise TooSlowError(
                    f"its warm-up was not done after {elapsed:.0f} s, and {limit_s:g} are "
                    "allowed; raise warmup_seconds"
                )
            check = turn.variant.verify if index == 0 else None
            take(turn, clock, draw(index), repeats, inference, check)
            clock.settle()
            if index < turns - 1:
                turn.marks.clear()
        read(turn, clock)
        turn.warm_ms = sum(samples[-1] for samples in timing.samples.values())
    except Exception as error:
        give_up(timing, error)
    finally:
        # Its times are not those of a round, also where an interrupt goes through.
        turn.marks.clear()
        timing.samples.clear()
        timing.peak_bytes = None
    if timing.reason is not None:
        # Not above: the error's traceback holds on to tensors.
        turn.close()
        free_memory()
    return time.perf_counter() - start
