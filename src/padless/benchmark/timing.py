"""Times variants of one computation by turns, so that all of them see the same machine.

One turn of every variant makes a round. Slow variants sit some rounds out. A variant that cannot be
had, or fails, or computes wrong numbers is a row with the reason, and the others go on.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from padless.benchmark.clock import Clock
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.variant import Timing, Variant

# A variant this much slower than the fastest is timed in every second round, and so on.
_SIT_OUT_AT_MOST = 4
_logger = logging.getLogger(__name__)


@dataclass
class _Turn:
    """A variant that takes part, and the marks of its current round."""

    variant: Variant
    timing: Timing
    every: int = 1
    batch: Any = None
    inputs: Any = None
    marks: list[tuple[str, Any, Any]] = field(default_factory=list)


def measure(
    builders: dict[str, Callable[[], Variant]],
    clock: Clock,
    *,
    draw: Callable[[int], Any],
    seconds: float,
    repeats: int = 1,
    inference: bool = False,
    warmup: int = 3,
    min_rounds: int = 5,
    max_rounds: int = 200,
    seed: int = 0,
) -> list[Timing]:
    """Builds, checks, warms up and times variants.

    Args:
        builders: makes each variant, by the name of its row; whatever it raises is its reason.
        clock: of the device.
        draw: makes the batch of a turn's number; the same object each time if it stays the same.
        seconds: for the rounds, without building and warming up.
        repeats: turns with the same batch in a row: the second is counted as "again".
        inference: whether "forward" is timed by itself, without autograd; otherwise it is the part
            of a training step in front of its backward.
        warmup: turns of each variant before the rounds; the first of them is checked.
        min_rounds: are made even if the time is over, unless it is three times over; one is always.
        max_rounds: are not passed.
        seed: of the order within rounds.

    Returns:
        A timing for each builder, in their order.
    """
    timings = {name: Timing(name) for name in builders}
    turns = []
    for name, build in builders.items():
        _logger.info("warming up: %s", name)
        turn = _warm_up(build, timings[name], clock, draw, repeats, inference, warmup)
        if turn is not None:
            turns.append(turn)
    _sit_out(turns)
    _logger.info("timing %d variants", len(turns))
    order = random.Random(seed)
    start = time.perf_counter()
    with without_collections():
        for index in range(max_rounds):
            gc.collect()
            elapsed = time.perf_counter() - start
            # The first round, in which nobody sits out, is made in any case.
            if index and (elapsed > 3 * seconds or (index >= min_rounds and elapsed > seconds)):
                break
            _round(turns, clock, draw(warmup + index), index, repeats, inference, order)
    for timing in timings.values():
        if timing.reason is None and not timing.samples:
            timing.reason = "no turn in the time there was"
    return list(timings.values())


@contextmanager
def without_collections() -> Iterator[None]:
    """Keeps Python's collector out of turns for a while; what is alive now is not looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _warm_up(
    build: Callable[[], Variant],
    timing: Timing,
    clock: Clock,
    draw: Callable[[int], Any],
    repeats: int,
    inference: bool,
    warmup: int,
) -> _Turn | None:
    try:
        variant = build()
        turn = _Turn(variant, timing)
        timing.facts.update(variant.facts)
        for index in range(warmup):
            check = variant.verify if index == 0 else None
            _take(turn, clock, draw(index), repeats, inference, check)
            clock.settle()
            if index < warmup - 1:
                turn.marks.clear()
        _read(turn, clock)
    except Exception as error:
        give_up(timing, error)
    if timing.reason is not None:
        free_memory()
        return None
    return turn


def _sit_out(turns: list[_Turn]) -> None:
    """Lets slow variants take every second, third or fourth turn; forgets the warm-up's times."""
    longest = {id(turn): sum(t[-1] for t in turn.timing.samples.values()) for turn in turns}
    fastest = min(longest.values(), default=0.0)
    for turn in turns:
        if fastest > 0:
            times = round(longest[id(turn)] / fastest)
            turn.every = max(1, min(_SIT_OUT_AT_MOST, times))
        turn.timing.samples.clear()
        turn.timing.peak_bytes = None


def _round(
    turns: list[_Turn],
    clock: Clock,
    batch: Any,
    index: int,
    repeats: int,
    inference: bool,
    order: random.Random,
) -> None:
    # In another order each time: nobody has the same one in front in all rounds.
    for turn in order.sample(turns, len(turns)):
        if index % turn.every or turn.timing.reason is not None:
            continue
        try:
            _take(turn, clock, batch, repeats, inference)
        except Exception as error:
            give_up(turn.timing, error)
        if turn.timing.reason is not None:
            # Not above: the error's traceback holds on to tensors.
            turn.batch = turn.inputs = None
            free_memory()
    for turn in turns:
        try:
            clock.settle()
            _read(turn, clock)
        except Exception as error:
            give_up(turn.timing, error)


def _take(
    turn: _Turn,
    clock: Clock,
    batch: Any,
    repeats: int,
    inference: bool,
    check: Callable[[Any, Tensor], dict[str, Any]] | None = None,
) -> None:
    """Runs a variant's turn; the marks are read later."""
    variant = turn.variant
    if turn.batch is not batch or turn.inputs is None:
        turn.batch, turn.inputs = batch, variant.prepare(batch)
    with variant.context():
        if inference or not variant.is_differentiable:
            with torch.no_grad():
                clock.lead()
                start = clock.mark()
                variant.forward(turn.inputs)
                turn.marks.append(("forward", start, clock.mark()))
        for repeat in range(repeats if variant.is_differentiable else 0):
            try:
                marks = _forward_backward(turn, clock, check if repeat == 0 else None)
            finally:
                for leaf in variant.leaves:
                    leaf.grad = None
            start, middle, end = marks
            if repeat:
                turn.marks.append(("again", start, end))
                continue
            turn.marks.append(("forward_backward", start, end))
            if not inference:
                turn.marks.append(("forward", start, middle))


def _forward_backward(
    turn: _Turn, clock: Clock, check: Callable[[Any, Tensor], dict[str, Any]] | None
) -> tuple[Any, Any, Any]:
    """Computes once; returns the marks before, between and behind."""
    clock.forget_peak()
    clock.lead()
    start = clock.mark()
    out, dout = turn.variant.forward(turn.inputs)
    middle = clock.mark()
    out.backward(dout)
    end = clock.mark()
    _note_peak(turn.timing, clock)
    if check is not None:
        turn.timing.facts.update(check(turn.inputs, out.detach()))
    return start, middle, end


def _note_peak(timing: Timing, clock: Clock) -> None:
    peak = clock.peak_bytes()
    if peak is not None:
        timing.peak_bytes = max(peak, timing.peak_bytes or 0)


def _read(turn: _Turn, clock: Clock) -> None:
    marks, turn.marks = turn.marks, []
    if turn.timing.reason is not None:
        return
    for measure_name, start, end in marks:
        elapsed = clock.elapsed_ms(start, end)
        turn.timing.samples.setdefault(measure_name, []).append(elapsed)
