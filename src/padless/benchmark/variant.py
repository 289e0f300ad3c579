"""One way to compute, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Makes the variant's inputs of a round's batch, untimed.
Prepare = Callable[[Any], Any]
# Computes; returns the output and its gradient (None: it is a scalar).
Forward = Callable[[Any], tuple[Tensor, Tensor | None]]


class WrongNumbersError(Exception):
    """A variant does not compute what it has to."""


@dataclass
class Variant:
    """One way to compute.

    Attributes:
        forward: from prepared inputs to an output.
        prepare: makes the inputs of a round's batch.
        leaves: whose gradients are dropped after each turn.
        context: is entered for each turn, outside the measured time.
        verify: is given the prepared inputs and the output after the first backward, with gradients
            in place, or of the first forward if that is all; returns figures for the row, or raises
            WrongNumbersError.
        facts: for the row, such as the kernel that ran.
        is_differentiable: whether there is a backward to time.
        close: puts back what building changed, and may add to the facts; called once, in any case.
    """

    forward: Forward
    prepare: Prepare = lambda batch: batch
    leaves: Iterable[Tensor] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    verify: Callable[[Any, Tensor], dict[str, Any]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    is_differentiable: bool = True
    close: Callable[[], None] = lambda: None


@dataclass
class Timing:
    """What was measured of a variant.

    Attributes:
        name: of its row.
        reason: why there are no numbers; None if there are.
        samples: milliseconds by measure: "forward", "forward_backward", and with repeats "again",
            the same inputs a second time.
        rounds: numbers of the rounds that the samples are from.
        peak_bytes: highest memory use of a turn, in tensors.
        facts: further figures for the row.
    """

    name: str
    reason: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)
    peak_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def drop_before(self, index: int) -> None:
        """Drops what is from rounds before this one; a turn gives one sample of each measure."""
        count = sum(number < index for number in self.rounds)
        del self.rounds[:count]
        for samples in self.samples.values():
            del samples[:count]
