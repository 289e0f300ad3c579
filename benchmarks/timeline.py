"""What a GPU did when: stretches of communication and of computation, and where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

# Begin and end, in microseconds.
Stretch = tuple[float, float]
Kernel = tuple[str, float, float]
# The kernel of `torch.cuda._sleep`.
_MARK = "spin_kernel"


class Timeline(NamedTuple):
    """One turn on one GPU.

    Attributes:
        communication: stretches in which NCCL's kernels ran, in order, none touching another.
        computation: the same for all other kernels.
    """

    communication: list[Stretch]
    computation: list[Stretch]

    @property
    def hidden(self) -> float | None:
        """Share of the time of communication in which something was computed; None without any."""
        whole = _length(self.communication)
        return _length(overlap(*self)) / whole if whole else None

    def as_facts(self) -> dict[str, Any]:
        """Returns it as JSON values, the first stretch beginning at 0."""
        begin = min((first for first, _ in (*self.communication, *self.computation)), default=0.0)
        made = {
            name: [[round(first - begin, 1), round(last - begin, 1)] for first, last in stretches]
            for name, stretches in self._asdict().items()
        }
        return {**made, "communication_hidden": self.hidden}


def record_timeline(
    run: Callable[[], object], lead: Callable[[], object] = lambda: None
) -> Timeline | None:
    """Runs something on the current GPU and notes its kernels; None where there is no GPU.

    Args:
        run: has run before, so that nothing is compiled or set up in it.
        lead: gives the GPU something to do in front of it, which is not noted: on an idle GPU every
            first launch would be waited for, as none is inside of a long model.
    """
    if not torch.cuda.is_available():
        run()
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        lead()
        torch.cuda._sleep(1)
        run()
        torch.cuda.synchronize()
    return sort_kernels(
        behind_mark(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if str(event.device_type).endswith("CUDA")
        )
    )


def behind_mark(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Leaves out the mark, and what began before its end; nothing where there is none.

    Args:
        kernels: name, begin and end of each, in any order.
    """
    kernels = list(kernels)
    begin = max((last for name, _, last in kernels if _MARK in name), default=float("-inf"))
    return [kernel for kernel in kernels if kernel[1] >= begin]


def sort_kernels(kernels: Iterable[Kernel]) -> Timeline:
    """Tells communication from computation, by the names of kernels.

    Args:
        kernels: name, begin and end of each, in any order.
    """
    sides: tuple[list[Stretch], list[Stretch]] = ([], [])
    for name, first, last in kernels:
        sides["nccl" not in name.lower()].append((first, last))
    return Timeline(*map(joined, sides))


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Joins stretches that touch or overlap, and sorts them."""
    made: list[Stretch] = []
    for first, last in sorted(stretches):
        if made and first <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], last))
        else:
            made.append((first, last))
    return made


def overlap(one: list[Stretch], other: list[Stretch]) -> list[Stretch]:
    """Finds where both are, of two lists as `joined` gives them."""
    met = [
        (max(first, begin), min(last, end))
        for first, last in one
        for begin, end in other
        if max(first, begin) < min(last, end)
    ]
    return joined(met)


def _length(stretches: list[Stretch]) -> float:
    return sum(last - first for first, last in stretches)
