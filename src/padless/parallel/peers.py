"""Tensors that ranks of one host read out of each other's memory.

NCCL sends by kernels, which need a part of the GPU. Attention leaves them none: where it is
launched in front of them they wait, and where it runs beside them it is slower. A copy out of
memory that the other GPU has opened is done by a copy engine, beside whatever is computed.

The memory is torch's symmetric memory, which is of alpha quality there: it is tried by a small
exchange first, and ranks that cannot have it, or do not agree, send by NCCL.
"""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from padless.parallel.group import SequenceGroup

_logger = logging.getLogger("padless")
# Not by default: nobody has measured it yet.
_copies: ContextVar[bool] = ContextVar("padless_copies_of_peers", default=False)
# Where a tensor may begin, and what a window grows by at least.
_ALIGNED = 256
_GRAIN = 2**24
# Exchanges of the trial: each part of the memory is written again.
_TURNS = 3


class Window(Protocol):
    """As many bytes of each rank, which every rank of a group may read."""

    def buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        """Gives a part of a rank's bytes as a tensor; offset in bytes."""

    def barrier(self) -> None:
        """Lets what comes behind it on the current stream begin once all ranks have come here."""


# Makes a window of so many bytes; every rank has to call it.
Opener = Callable[[int], Window]


class Arriving(NamedTuple):
    """Tensors on their way.

    Attributes:
        received: where they come to.
        hold: lets the current stream go on once they are there; None where nothing is under way.
    """

    received: tuple[Tensor, ...]
    hold: Callable[[], None] | None

    def wait(self) -> tuple[Tensor, ...]:
        """Gives them to the current stream."""
        if self.hold is not None:
            self.hold()
        return self.received


class PeerCopies:
    """Exchanges of one group on one device.

    Every rank has to take part in each exchange, in the same order.

    Args:
        open_window: makes the memory.
        device: of the tensors.
        rank: of this process in the group.
        pending: exchanges that are under way at most when another begins.
    """

    def __init__(self, open_window: Opener, device: torch.device, rank: int, pending: int) -> None:
        self._open = open_window
        self._device = device
        self._rank = rank
        self._slots = pending + 1
        self._window: Window | None = None
        self._capacity = 0
        self._begun = 0

    def open(self) -> None:
        """Makes a first window."""
        self._of_size(1)

    def start(self, sent: Sequence[Tensor], source: int, counts: Sequence[int]) -> Arriving:
        """Shows tensors to all ranks, and begins to copy those of one of them.

        Args:
            sent: `(counts[rank], ...)` each, of any shape and dtype behind the first dimension that
                all ranks have alike; free to be written to as soon as this returns.
            source: rank whose tensors are wanted.
            counts: rows of each rank's tensors.

        Returns:
            Them, `(counts[source], ...)`.
        """
        offsets, size = [], 0
        for x in sent:
            offsets.append(size)
            size += _aligned(max(counts) * math.prod(x.shape[1:]) * x.element_size())
        window = self._of_size(size)
        begin = self._begun % self._slots * self._capacity
        self._begun += 1
        # All ranks have read what they wanted of what stood here.
        window.barrier()
        for x, offset in zip(sent, offsets, strict=True):
            if x.numel():
                window.buffer(self._rank, x.shape, x.dtype, begin + offset).copy_(x)
        # All have written.
        window.barrier()
        received = tuple(x.new_empty(counts[source], *x.shape[1:]) for x in sent)
        if not counts[source]:
            return Arriving(received, None)
        theirs = [
            window.buffer(source, x.shape, x.dtype, begin + offset)
            for x, offset in zip(received, offsets, strict=True)
        ]
        return Arriving(received, _copy_aside(received, theirs))

    def _of_size(self, size: int) -> Window:
        if self._window is None or size > self._capacity:
            if self._window is not None:
                # Nobody may still read out of what goes: this rank does not, and then none does.
                self._finish_all()
                self._window.barrier()
                self._finish_all()
                self._window = None
            self._capacity = -(-size // _GRAIN) * _GRAIN
            self._window = self._open(self._slots * self._capacity)
        return self._window

    def _finish_all(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _copy_aside(received: Sequence[Tensor], theirs: Sequence[Tensor]) -> Callable[[], None]:
    """Copies on CUDA beside the current stream; gives what has that wait for it."""
    device = received[0].device
    aside = _stream_of(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for x, y in zip(received, theirs, strict=True):
            x.copy_(y, non_blocking=True)
            # Should nobody come to wait for it.
            x.record_stream(aside)
        arrived = torch.cuda.Event()
        arrived.record(aside)
    return lambda: torch.cuda.current_stream(device).wait_event(arrived)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# By torch's own group: memory is given back when that is gone.
_opened: weakref.WeakKeyDictionary[Any, dict[torch.device, PeerCopies | None]]
_opened = weakref.WeakKeyDictionary()


@contextmanager
def copying() -> Iterator[None]:
    """Has rings that begin in this thread copy where they can; every rank has to be in it."""
    token = _copies.set(True)
    try:
        yield
    finally:
        _copies.reset(token)


def copies_of(group: SequenceGroup, device: torch.device) -> PeerCopies | None:
    """Finds a group's exchanges by copies; None where its ranks have to send.

    The first call opens memory, and every rank of the group has to come to it.

    Args:
        group: the ranks.
        device: of the tensors.
    """
    if not _copies.get() or not _may_open(group, device):
        return None
    known = _opened.setdefault(group.process_group, {})
    if device not in known:
        known[device] = _open_copies(group, device)
    return known[device]


def _open_copies(group: SequenceGroup, device: torch.device) -> PeerCopies | None:
    # On two ranks an exchange is waited for before the next one begins; on more, gradients begin to
    # travel while keys do.
    pending = 0 if group.size == 2 else 1
    copies = PeerCopies(symmetric_opener(group, device), device, group.rank, pending)
    # Behind each step the ranks tell each other how it went: none may wait for one that has failed.
    for step in (copies.open, functools.partial(_try, copies, group, device)):
        fault = None
        try:
            step()
        except Exception as error:
            fault = error
        if not group.agrees(fault is None, device):
            _logger.info("sequences are sent by NCCL, not copied: %s", fault or "on another rank")
            return None
    return copies


def _may_open(group: SequenceGroup, device: torch.device) -> bool:
    """Whether it is worth a try; the same on every rank."""
    return device.type == "cuda" and group.size > 1 and group.is_within_host


def _try(copies: PeerCopies, group: SequenceGroup, device: torch.device) -> None:
    """Exchanges a few numbers; raises if others arrive."""
    counts = [3 + rank for rank in range(group.size)]

    def numbers(rank: int, turn: int) -> Tensor:
        start = 1000 * rank + 100 * turn
        return torch.arange(start, start + 2 * counts[rank], device=device).view(-1, 2)

    right = True
    for turn in range(_TURNS):
        source = (group.rank - 1) % group.size
        own = numbers(group.rank, turn)
        whole, half = copies.start((own, own.to(torch.float16)), source, counts).wait()
        want = numbers(source, turn)
        right &= torch.equal(whole, want) and torch.equal(half, want.to(torch.float16))
    # Behind all of them, since the others wait for this rank in each.
    if not right:
        raise RuntimeError("other numbers arrived than were shown")


class _Symmetric(NamedTuple):
    """torch's symmetric memory as a window.

    Attributes:
        held: this rank's bytes.
        handle: of all ranks'.
    """

    held: Tensor
    handle: Any

    def buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        found: Tensor = self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return found

    def barrier(self) -> None:
        self.handle.barrier()


def symmetric_opener(group: SequenceGroup, device: torch.device) -> Opener:
    """Makes what opens torch's symmetric memory.

    Args:
        group: the ranks.
        device: a CUDA device, another one on each rank.

    Note:
        The opener raises whatever torch raises where there is none.
    """
    # Not the group itself: what is kept by it must not keep it.
    name = group.process_group.group_name

    def open_window(size: int) -> Window:
        from torch._C._distributed_c10d import _SymmetricMemory

        held = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        return _Symmetric(held, _SymmetricMemory.rendezvous(held, name))

    return open_window
