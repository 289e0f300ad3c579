"""One variant's turn: its inputs, its marks on the clock, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from padless.benchmark.clock import Clock
from padless.benchmark.variant import Timing, Variant


@dataclass
class Turn:
    """A variant that takes part, and the marks of its current round.

    Attributes:
        timing: what is measured of it.
        variant: what it computes.
        every: it takes the rounds whose number this divides.
        batch: that its inputs were made of.
        inputs: of the current round.
        marks: measure, start and end, not read yet.
        warm_ms: what it took when it was warm, in front of the rounds.
    """

    timing: Timing
    variant: Variant = field(default_factory=lambda: Variant(forward=lambda inputs: inputs))
    every: int = 1
    batch: Any = None
    inputs: Any = None
    marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    warm_ms: float = 0.0

    def close(self) -> None:
        """Lets the variant put back what it changed, and takes its last facts."""
        variant, self.variant = self.variant, Variant(forward=lambda inputs: inputs)
        self.batch = self.inputs = None
        variant.close()
        if self.timing.reason is None:
            self.timing.facts.update(variant.facts)


def take(
    turn: Turn,
    clock: Clock,
    batch: Any,
    repeats: int,
    inference: bool,
    check: Callable[[Any, Tensor], dict[str, Any]] | None = None,
) -> None:
    """Runs a variant's turn; the marks are read later.

    Args:
        turn: the variant's.
        clock: of the device.
        batch: of the round.
        repeats: times that it is computed.
        inference: whether "forward" is timed by itself, without autograd.
        check: is given inputs and output, with gradients in place.
    """
    variant = turn.variant
    if turn.batch is not batch or turn.inputs is None:
        turn.batch, turn.inputs = batch, variant.prepare(batch)
    with variant.context():
        if inference or not variant.is_differentiable:
            with torch.no_grad():
                if not variant.is_differentiable:
                    clock.forget_peak()
                clock.lead()
                start = clock.mark()
                out, _ = variant.forward(turn.inputs)
                turn.marks.append(("forward", start, clock.mark()))
                if not variant.is_differentiable:
                    _note_peak(turn.timing, clock)
                    if check is not None:
                        turn.timing.facts.update(check(turn.inputs, out))
                del out
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
    turn: Turn, clock: Clock, check: Callable[[Any, Tensor], dict[str, Any]] | None
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


def read(turn: Turn, clock: Clock, index: int | None = None) -> None:
    """Reads the marks into the timing, after `settle`.

    Args:
        turn: whose marks they are.
        clock: that they were made with.
        index: number of the round, if it is one.
    """
    marks, turn.marks = turn.marks, []
    if turn.timing.reason is not None:
        return
    if marks and index is not None:
        turn.timing.rounds.append(index)
    for measure_name, start, end in marks:
        elapsed = clock.elapsed_ms(start, end)
        turn.timing.samples.setdefault(measure_name, []).append(elapsed)
