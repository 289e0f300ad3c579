"""What is asked of backends, in the order in which it is needed, and how long may be measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Heads, KV heads and head_dim of the models that people patch.
USUAL_SHAPES = {
    "llama-7b": (32, 32, 128),
    "llama3-8b": (32, 8, 128),
    "smollm2-135m": (9, 3, 64),
}
DTYPES = ("bfloat16", "float16", "float32")

_BY_NEED = ("llama3-8b", "llama-7b", "smollm2-135m")
# Seconds of measuring where the caller says nothing: what is needed most may take the time that
# kernels take to compile, the rest what those take that are compiled already.
_NEEDED_S = 20.0
_REST_S = 5.0


class Usual(NamedTuple):
    """A usual request: what a model of this shape asks for.

    Attributes:
        shape: name of it.
        dtype: as torch names it.
        training: whether gradients are asked for.
    """

    shape: str
    dtype: str
    training: bool

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {'training' if self.training else 'inference'}"


# In the order of reports.
REQUESTS = tuple(
    Usual(shape, dtype, training)
    for shape in USUAL_SHAPES
    for dtype in DTYPES
    for training in (False, True)
)


def usual_dtype(device: str, capability: str | None) -> str:
    """Names the dtype that LLaMAs have on a device.

    Args:
        device: as torch names it.
        capability: compute capability, as "9.0"; None for a CPU and for AMD's GPUs.
    """
    if device == "cpu":
        return "float32"
    before_ampere = capability is not None and int(capability.split(".")[0]) < 8
    return "float16" if before_ampere else "bfloat16"


def most_needed(dtype: str) -> tuple[Usual, ...]:
    """Lists the requests whose answer a doctor must not leave open, in the order of need.

    Args:
        dtype: from `usual_dtype`.
    """
    return tuple(Usual(_BY_NEED[0], dtype, training) for training in (True, False))


def in_order_of_need(dtype: str) -> list[int]:
    """Orders the numbers of all requests: the usual dtype first, then shapes, then training.

    Args:
        dtype: from `usual_dtype`.
    """

    def place(number: int) -> tuple[bool, int, int, bool]:
        usual = REQUESTS[number]
        at = DTYPES.index(usual.dtype)
        return usual.dtype != dtype, at, _BY_NEED.index(usual.shape), not usual.training

    return sorted(range(len(REQUESTS)), key=place)


class Budget:
    """How long may be measured. What runs is never cut off; nothing is begun behind the budget.

    Args:
        seconds: for everything; None is 20 for what is needed most and 5 for the rest.
        spent: seconds that were spent before, on what is needed most and on the rest.
        clock: seconds that have passed.
    """

    def __init__(
        self,
        seconds: float | None,
        spent: Sequence[float] = (0.0, 0.0),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._spent = list(spent)
        self._running: tuple[bool, float] | None = None

    def start(self, needed: bool) -> None:
        """Begins a measurement: of what is needed most, or of the rest."""
        self.stop()
        self._running = (needed, self._clock())

    def stop(self) -> None:
        """Ends the measurement that runs, if one does."""
        self._spent, self._running = self.spent, None

    @property
    def spent(self) -> list[float]:
        """Seconds that were spent on what is needed most and on the rest; what runs counts too."""
        spent = list(self._spent)
        if self._running is not None:
            needed, since = self._running
            spent[not needed] += self._clock() - since
        return spent

    def allows(self, needed: bool, expected_s: float) -> bool:
        """Whether a measurement may begin.

        Args:
            needed: whether it is of what is needed most, which waits for no expectation.
            expected_s: how long it will take.
        """
        if self._seconds is not None:
            left = self._seconds - sum(self.spent)
        else:
            left = (_NEEDED_S if needed else _REST_S) - self.spent[not needed]
        return left > 0 and (needed or expected_s <= left)
