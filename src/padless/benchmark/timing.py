"""Times variants of one computation by turns, so that all of them see the same machine.

One turn of every variant makes a round. Slow variants may sit some rounds out. A variant that
cannot be had, or fails, or computes wrong numbers is a row with the reason, and the others go on.
Every variant that was built is closed, whatever happens.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from padless.benchmark.clock import Clock
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.turn import Turn, read, take
from padless.benchmark.variant import Timing, Variant
from padless.benchmark.warmup import warm_up

# Is given what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
# Of the seconds, for the others in front of the warm-up of those that are late.
_BEFORE_LATE = 0.25
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
    late: Collection[str] = (),
    warmup_limits: Mapping[str, float] | None = None,
    into: list[Timing] | None = None,
    on_progress: Progress | None = None,
    before_late: Callable[[], None] | None = None,
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
        max_rounds: are not passed, in front of those that are late nor behind.
        seed: of the order within rounds.
        sit_out_at_most: a variant this much slower than the fastest, or more, is timed in every
            round of this number; a variant half as slow in twice as many. 1: nobody sits out.
        late: names of those whose warm-up may take very long. The others are timed for a quarter of
            the seconds in front of it, so that there is something if it does not end. All begin
            anew behind it: what was measured before goes once a round with all of them is done.
        warmup_limits: seconds, by name, behind which a warm-up is given up.
        into: gets the timings before they have any figures: what it holds when KeyboardInterrupt
            passes through is what had been measured.
        on_progress: called before each turn, and with what came of each warm-up.
        before_late: called in front of the warm-up of those that are late.

    Returns:
        A timing for each builder, in their order.
    """
    timings = {name: Timing(name) for name in builders}
    if into is not None:
        into.extend(timings.values())
    limits = warmup_limits or {}
    rounds = _Rounds(clock, draw, repeats, inference, random.Random(seed), on_progress)
    rounds.min_rounds, rounds.max_rounds = min_rounds, max_rounds

    def warm(names: list[str]) -> bool:
        for name in names:
            limit_s = limits.get(name, math.inf)
            rounds.join(timings[name], builders[name], warmup, limit_s, of=len(builders))
        rounds.sit_out(sit_out_at_most)
        return any(timings[name].reason is None for name in names)

    try:
        warm([name for name in builders if name not in late])
        if late := [name for name in builders if name in late]:
            rounds.run(_BEFORE_LATE * seconds, f"timing by turns, before {', '.join(late)}")
            if before_late is not None:
                before_late()
            is_anew = warm(late)
            rounds.run((1 - _BEFORE_LATE) * seconds, "timing by turns", anew=is_anew)
        else:
            rounds.run(seconds, "timing by turns")
    finally:
        rounds.close()
    for timing in timings.values():
        if timing.reason is None and not timing.samples:
            timing.reason = "no turn in the time there was"
    return list(timings.values())


class _Rounds:
    """Variants that take turns, and how far they are."""

    min_rounds = 5
    max_rounds = 200

    def __init__(
        self,
        clock: Clock,
        draw: Callable[[int], Any],
        repeats: int,
        inference: bool,
        order: random.Random,
        on_progress: Progress | None,
    ) -> None:
        self._clock, self._draw, self._order = clock, draw, order
        self._repeats, self._inference = repeats, inference
        self._tell = on_progress or (lambda *_: None)
        self._turns: list[Turn] = []
        self._warmup, self._done = 0, 0

    def join(
        self,
        timing: Timing,
        build: Callable[[], Variant],
        warmup: int,
        limit_s: float,
        *,
        of: int,
    ) -> None:
        """Warms a variant up and lets it take part from now on, if nothing is wrong with it."""
        _logger.info("warming up: %s", timing.name)
        self._tell(f"warming up: {timing.name}", len(self._turns), of)
        self._warmup = warmup
        turn = Turn(timing)
        self._turns.append(turn)
        elapsed = warm_up(
            turn,
            build,
            self._clock,
            self._draw,
            turns=warmup,
            repeats=self._repeats,
            inference=self._inference,
            limit_s=limit_s,
        )
        became = f"warmed up: {timing.name} in {elapsed:.1f} s"
        self._tell(_lost(timing) or became, len(self._turns), of)

    def sit_out(self, at_most: int) -> None:
        """Lets slow variants take every second, third or fourth turn."""
        taking = [turn for turn in self._turns if turn.timing.reason is None]
        fastest = min((turn.warm_ms for turn in taking), default=0.0)
        for turn in taking:
            if fastest > 0:
                turn.every = max(1, min(at_most, round(turn.warm_ms / fastest)))

    def run(self, seconds: float, stage: str, *, anew: bool = False) -> None:
        """Makes rounds.

        Args:
            seconds: of them.
            stage: what to call them.
            anew: whether what was measured before goes, as soon as there is a round of these.
        """
        taking = [turn for turn in self._turns if turn.timing.reason is None]
        _logger.info("timing %d variants", len(taking))
        start, before = time.perf_counter(), self._done

        def tell(what: str) -> None:
            spent = min(time.perf_counter() - start, seconds)
            self._tell(what, round(1e3 * spent), round(1e3 * seconds))

        with without_collections():
            while self._done - before < self.max_rounds:
                gc.collect()
                index, elapsed = self._done - before, time.perf_counter() - start
                # The first round, in which nobody sits out, is made in any case.
                if index and (
                    elapsed > 3 * seconds or (index >= self.min_rounds and elapsed > seconds)
                ):
                    break
                self._round(taking, index, stage, tell)
                self._done += 1
                if anew and index == 0:
                    for turn in taking:
                        turn.timing.drop_before(before)

    def close(self) -> None:
        """Closes every variant that was built."""
        for turn in self._turns:
            turn.close()

    def _round(
        self, taking: list[Turn], index: int, stage: str, tell: Callable[[str], None]
    ) -> None:
        batch = self._draw(self._warmup + self._done)
        try:
            # In another order each time: nobody has the same one in front in all rounds.
            for turn in self._order.sample(taking, len(taking)):
                if index % turn.every or turn.timing.reason is not None:
                    continue
                tell(stage)
                try:
                    take(turn, self._clock, batch, self._repeats, self._inference)
                except Exception as error:
                    give_up(turn.timing, error)
                if turn.timing.reason is not None:
                    # Not above: the error's traceback holds on to tensors.
                    turn.close()
                    free_memory()
                    tell(_lost(turn.timing))
        finally:
            # Turns that were taken before an interrupt count too.
            for turn in taking:
                try:
                    self._clock.settle()
                    read(turn, self._clock, self._done)
                except Exception as error:
                    give_up(turn.timing, error)


def _lost(timing: Timing) -> str:
    """Says why a variant does not take part; empty if it does."""
    return "" if timing.reason is None else f"not measured: {timing.name}: {timing.reason}"


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
