"""Times variants of one computation by turns, so that all of them see the same machine.

One turn of every variant makes a round. Slow variants may sit some rounds out. A variant that
cannot be had, or fails, or computes wrong numbers is a row with the reason, and the others go on.
Every variant that was built is closed, whatever happens.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from padless.benchmark.clock import Clock
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.turn import Turn, read, take
from padless.benchmark.variant import Timing, Variant

# Is given what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
_logger = logging.getLogger(__name__)


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
    sit_out_at_most: int = 4,
    into: list[Timing] | None = None,
    on_progress: Progress | None = None,
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
        sit_out_at_most: a variant this much slower than the fastest, or more, is timed in every
            round of this number; a variant half as slow in twice as many. 1: nobody sits out.
        into: gets the timings before they have any figures: what it holds when KeyboardInterrupt
            passes through is what had been measured.
        on_progress: called before each turn.

    Returns:
        A timing for each builder, in their order.
    """
    timings = {name: Timing(name) for name in builders}
    if into is not None:
        into.extend(timings.values())
    tell = on_progress or (lambda *_: None)
    turns: list[Turn] = []
    try:
        for at, (name, build) in enumerate(builders.items()):
            _logger.info("warming up: %s", name)
            tell(f"warming up: {name}", at, len(builders))
            turn = Turn(timings[name])
            turns.append(turn)
            _warm_up(turn, build, clock, draw, repeats, inference, warmup)
    except BaseException:
        _forget(turns)
        raise
    else:
        turns = [turn for turn in turns if turn.timing.reason is None]
        _sit_out(turns, sit_out_at_most)
        _logger.info("timing %d variants", len(turns))
        order = random.Random(seed)
        start = time.perf_counter()

        def tell_time() -> None:
            spent = min(time.perf_counter() - start, seconds)
            tell("timing by turns", round(1e3 * spent), round(1e3 * seconds))

        with without_collections():
            for index in range(max_rounds):
                gc.collect()
                elapsed = time.perf_counter() - start
                # The first round, in which nobody sits out, is made in any case.
                if index and (elapsed > 3 * seconds or (index >= min_rounds and elapsed > seconds)):
                    break
                batch = draw(warmup + index)
                _round(turns, clock, batch, index, repeats, inference, order, tell_time)
    finally:
        for turn in turns:
            turn.close()
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
    turn: Turn,
    build: Callable[[], Variant],
    clock: Clock,
    draw: Callable[[int], Any],
    repeats: int,
    inference: bool,
    warmup: int,
) -> None:
    """Builds the variant and takes its first turns, or notes why not and closes it."""
    timing = turn.timing
    try:
        turn.variant = build()
        timing.facts.update(turn.variant.facts)
        for index in range(warmup):
            check = turn.variant.verify if index == 0 else None
            take(turn, clock, draw(index), repeats, inference, check)
            clock.settle()
            if index < warmup - 1:
                turn.marks.clear()
        read(turn, clock)
    except Exception as error:
        give_up(timing, error)
    if timing.reason is not None:
        # Not above: the error's traceback holds on to tensors.
        turn.close()
        free_memory()


def _sit_out(turns: list[Turn], at_most: int) -> None:
    """Lets slow variants take every second, third or fourth turn; forgets the warm-up's times."""
    longest = {id(turn): sum(t[-1] for t in turn.timing.samples.values()) for turn in turns}
    fastest = min(longest.values(), default=0.0)
    for turn in turns:
        if fastest > 0:
            times = round(longest[id(turn)] / fastest)
            turn.every = max(1, min(at_most, times))
    _forget(turns)


def _forget(turns: list[Turn]) -> None:
    """Drops the times of the warm-up."""
    for turn in turns:
        turn.marks.clear()
        turn.timing.samples.clear()
        turn.timing.peak_bytes = None


def _round(
    turns: list[Turn],
    clock: Clock,
    batch: Any,
    index: int,
    repeats: int,
    inference: bool,
    order: random.Random,
    tell: Callable[[], None],
) -> None:
    try:
        # In another order each time: nobody has the same one in front in all rounds.
        for turn in order.sample(turns, len(turns)):
            if index % turn.every or turn.timing.reason is not None:
                continue
            tell()
            try:
                take(turn, clock, batch, repeats, inference)
            except Exception as error:
                give_up(turn.timing, error)
            if turn.timing.reason is not None:
                # Not above: the error's traceback holds on to tensors.
                turn.close()
                free_memory()
    finally:
        # Turns that were taken before an interrupt count too.
        for turn in turns:
            try:
                clock.settle()
                read(turn, clock, index)
            except Exception as error:
                give_up(turn.timing, error)
