"""What each rank of a pool does for the tests of copies out of each other's memory.

On a CPU the memory is a file that all ranks map, and a barrier is the group's own.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from padless.parallel import peers
from padless.parallel.group import SequenceGroup
from padless.parallel.peers import PeerCopies
from sequence.attention_jobs import mesh

# Of each window that was opened here, and of each barrier.
opened: list[int] = []


class FileWindow:
    """Files that the ranks of a host map into their memory."""

    def __init__(self, group: SequenceGroup, size: int) -> None:
        opened.append(size)
        self._group = group
        found: list[Any] = [tempfile.mkdtemp()]
        first = dist.get_global_rank(group.process_group, 0)
        dist.broadcast_object_list(found, first, group=group.process_group)
        self._bytes = [
            torch.from_file(str(Path(found[0]) / str(rank)), True, size, dtype=torch.uint8)
            for rank in range(group.size)
        ]
        self.barrier()

    def buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[rank][offset : offset + size].view(dtype).view(tuple(shape))

    def barrier(self) -> None:
        dist.barrier(self._group.process_group)


def file_opener(group: SequenceGroup, device: torch.device) -> Callable[[int], FileWindow]:
    return lambda size: FileWindow(group, size)


def _copy_late(received: Sequence[Tensor], theirs: Sequence[Tensor]) -> Callable[[], None]:
    """Copies as late as a copy engine may: when somebody waits for it."""

    def hold() -> None:
        for x, y in zip(received, theirs, strict=True):
            x.copy_(y)

    return hold


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Has the ring copy instead of send, on the CPU."""
    peers._opened.clear()
    with (
        mock.patch.object(peers, "_may_open", lambda group, device: group.size > 1),
        mock.patch.object(peers, "symmetric_opener", file_opener),
        mock.patch.object(peers, "_GRAIN", peers._ALIGNED),
        mock.patch.object(peers, "_copy_aside", _copy_late),
        peers.copying(),
    ):
        yield
    peers._opened.clear()


def by_copies(job: str, *arguments: Any) -> tuple[Any, int, int]:
    """Runs `module:function(*arguments)`; gives its result, exchanges, and what was still sent."""
    module, _, function = job.partition(":")
    exchanges, sent = [], []
    start, batch = PeerCopies.start, dist.batch_isend_irecv

    def counted(self: PeerCopies, *given: Any) -> Any:
        exchanges.append(1)
        return start(self, *given)

    with (
        copying(),
        mock.patch.object(PeerCopies, "start", counted),
        mock.patch.object(dist, "batch_isend_irecv", lambda each: (sent.append(1), batch(each))[1]),
    ):
        found = getattr(importlib.import_module(module), function)(*arguments)
    return found, len(exchanges), len(sent)


def exchanges(fault: str | None) -> list[bool]:
    """Whether each of some exchanges of growing and shrinking tensors brings what was shown."""
    group = SequenceGroup.of(mesh())
    right = []
    with copying():
        copies = peers._open_copies(group, torch.device("cpu"))
        assert copies is not None
        if fault is not None:
            barrier, calls = FileWindow.barrier, []

            def faulty(self: FileWindow) -> None:
                # Ranks do not run alike: the first is behind the others.
                calls.append(1)
                if (len(calls) % 2 == 1) != (fault == "no barrier in front"):
                    barrier(self)
                if group.rank == 0:
                    time.sleep(0.05)

            patch: Any = mock.patch.object(FileWindow, "barrier", faulty)
        else:
            patch = contextlib.nullcontext()
        with patch:
            # In the sixth the first rank alone has something.
            for turn, rows in enumerate((40, 40, 40, 900, 3, None, 7)):
                ranks = range(group.size)
                counts = [int(rank == 0) if rows is None else rows + rank for rank in ranks]
                source = (group.rank + 1) % group.size
                own = torch.full((counts[group.rank], 3), 100.0 * turn + group.rank)
                found = copies.start((own, own.double()), source, counts).wait()
                want = torch.full((counts[source], 3), 100.0 * turn + source)
                right.append(torch.equal(found[0], want) and torch.equal(found[1], want.double()))
                # What was shown may be written over.
                own.fill_(-1.0)
    return right


def refused(where: str) -> tuple[bool, int]:
    """Whether all ranks send, where the last one cannot open memory or finds other numbers.

    And how much was opened when they were asked again.
    """
    group = SequenceGroup.of(mesh())
    is_last = group.rank == group.size - 1
    opened.clear()

    def failing(group: SequenceGroup, device: torch.device) -> Any:
        def open_window(size: int) -> Any:
            window = FileWindow(group, size)
            if is_last and where == "open":
                raise RuntimeError("no such memory")
            return window

        return open_window

    def wrong(x: Any, y: Any) -> bool:
        return not (is_last and where == "numbers")

    with (
        copying(),
        mock.patch.object(peers, "symmetric_opener", failing),
        mock.patch.object(torch, "equal", wrong),
    ):
        found = peers.copies_of(group, torch.device("cpu"))
        windows = len(opened)
        again = peers.copies_of(group, torch.device("cpu"))
    return found is None and again is None, len(opened) - windows
