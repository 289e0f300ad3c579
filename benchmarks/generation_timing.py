"""Times variants of generation by turns: the first token, and each one behind it.

A turn is two calls of `generate`, one for a single token and one for more. Each begins on an idle
device with cold caches and ends when the device has done all of it.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.generation_variants import Builder, Generating
from benchmarks.prompts import Prompts
from padless.benchmark.clock import Clock
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.timing import without_collections
from padless.benchmark.variant import Timing

# The prompts of the call for one token, and those of the other: same shape, or one of their own.
Turn = tuple[Prompts, Prompts]
# Is given the tokens of a variant's first turn; returns figures, or raises WrongNumbersError.
Check = Callable[[Tensor], dict[str, Any]]
_logger = logging.getLogger("benchmarks")


@dataclass
class _Player:
    """A variant that takes part, its columns of padding, and the memory that it holds."""

    variant: Generating | None
    timing: Timing
    columns: int
    thread: ThreadPoolExecutor
    held: int = 0

    def take(self, *arguments: Any) -> None:
        """Takes a turn, in the thread where the variant takes all of its turns."""
        if self.variant is not None and self.variant.has_thread:
            self.thread.submit(_take, self, *arguments).result()
        else:
            _take(self, *arguments)


def measure_generation(
    builders: dict[str, Builder],
    clock: Clock,
    *,
    draw: Callable[[int], Turn],
    tokens: int,
    check: Check,
    seconds: float,
    weight_bytes: int = 0,
    own_columns: bool = False,
    warmup: int = 1,
    min_rounds: int = 3,
    max_rounds: int = 10,
    seed: int = 0,
) -> list[Timing]:
    """Builds, checks, warms up and times variants.

    Args:
        builders: makes each variant, by the name of its row; whatever it raises is its reason.
        clock: of the device.
        draw: makes the prompts of a turn's number.
        tokens: that are generated behind the first one.
        check: of the first turn's tokens, `(batch, tokens + 1)`.
        seconds: for the rounds, without building and warming up.
        weight_bytes: of the model that all of them share.
        own_columns: whether each variant adds its own number of columns, 0, 2, ..., to the prompts.
        warmup: turns of each variant before the rounds.
        min_rounds: are made even if the time is over, unless it is three times over; one is always.
        max_rounds: are not passed.
        seed: of the order within rounds.

    Returns:
        A timing for each builder, in their order: "prefill" is the time to the first token,
        "decode" that of each one behind it.
    """
    timings = {name: Timing(name) for name in builders}
    players: list[_Player] = []
    for place, (name, build) in enumerate(builders.items()):
        _logger.info("warming up: %s", name)
        before = clock.held_bytes() or 0
        try:
            variant = build()
        except Exception as error:
            give_up(timings[name], error)
            free_memory()
            continue
        columns = 2 * place if own_columns else 0
        player = _Player(variant, timings[name], columns, ThreadPoolExecutor(1))
        player.held = (clock.held_bytes() or 0) - before
        for index in range(warmup):
            player.take(clock, draw(index), tokens, weight_bytes, None if index else check)
        players.append(player)
    for player in players:
        player.timing.samples.clear()
        player.timing.peak_bytes = None
        player.timing.facts.pop("over_weights_bytes", None)
    order = random.Random(seed)
    start = time.perf_counter()
    with without_collections():
        for index in range(max_rounds):
            gc.collect()
            elapsed = time.perf_counter() - start
            if index and (elapsed > 3 * seconds or (index >= min_rounds and elapsed > seconds)):
                break
            turn = draw(warmup + index)
            for player in order.sample(players, len(players)):
                player.take(clock, turn, tokens, weight_bytes)
    for player in players:
        _close(player)
        player.thread.shutdown()
    free_memory()
    for timing in timings.values():
        if timing.reason is None and not timing.samples:
            timing.reason = "no turn in the time there was"
    return list(timings.values())


def _take(
    player: _Player,
    clock: Clock,
    turn: Turn,
    tokens: int,
    weight_bytes: int,
    check: Check | None = None,
) -> None:
    """Runs a variant's turn, unless it has given up; what it raises is its reason."""
    timing, variant = player.timing, player.variant
    if timing.reason is not None or variant is None:
        return
    before = clock.held_bytes()
    try:
        inputs = [variant.prepare(prompts.widened(player.columns)) for prompts in turn]
        with variant.context():
            clock.forget_peak()
            first_ms, _ = _run(variant, clock, inputs[0], 1)
            all_ms, found = _run(variant, clock, inputs[1], tokens + 1)
        if check is not None:
            timing.facts.update(check(found))
            timing.facts.update(variant.facts())
    except Exception as error:
        give_up(timing, error)
    if timing.reason is not None:
        # Not above: the error's traceback holds on to tensors.
        inputs = variant = None
        _close(player)
        free_memory()
        return
    del inputs, found
    timing.samples.setdefault("prefill", []).append(first_ms)
    timing.samples.setdefault("decode", []).append((all_ms - first_ms) / tokens)
    peak, after = clock.peak_bytes(), clock.held_bytes()
    if before is not None and after is not None and peak is not None:
        # What other variants hold is not this one's.
        over_weights = peak - before + player.held
        over_weights = max(over_weights, timing.facts.get("over_weights_bytes", 0))
        timing.facts["over_weights_bytes"] = over_weights
        timing.peak_bytes = weight_bytes + over_weights
        player.held += after - before


def _run(variant: Generating, clock: Clock, inputs: Any, count: int) -> tuple[float, Tensor]:
    clock.lead()
    clock.settle()
    start = clock.mark()
    found = variant.generate(inputs, count)
    clock.settle()
    end = clock.mark()
    clock.settle()
    return clock.elapsed_ms(start, end), found


def _close(player: _Player) -> None:
    variant, player.variant = player.variant, None
    try:
        if variant is not None:
            variant.close()
    except Exception as error:
        _logger.warning("%s: closing: %s", player.timing.name, error)
