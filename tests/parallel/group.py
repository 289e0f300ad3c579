"""Worker processes that stay up for many checks: a gloo group on the CPU that runs named cases.

A case is a function of a module, `case(place, **options)`, that every rank runs at the same time.
What takes longer than its limit is a failure, and so is an error of one rank: the group is ended
then, with whatever hangs in it, and the next case gets a new one.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

LIMIT_S = 60.0
_START_S = 120.0


class CaseError(AssertionError):
    """A rank raised, or did not come back in time."""


class Place(NamedTuple):
    """Where a case runs.

    Attributes:
        rank: of this process.
        size: processes of the group.
        mesh: all of them, as one dimension.
        folder: shared by the ranks, empty when the group starts.
    """

    rank: int
    size: int
    mesh: DeviceMesh
    folder: Path


class Group:
    """Processes of one group.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._workers = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(theirs, rank, size, self._folder.name, sys.path), daemon=True
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        self._gather("the start", _START_S)

    def run(self, module: str, case: str, *, limit_s: float = LIMIT_S, **options: Any) -> list[Any]:
        """Runs a case on every rank.

        Args:
            module: where the case is.
            case: name of the function.
            limit_s: seconds until it counts as hanging.
            **options: of the case; tensors and plain values.

        Returns:
            What each rank returned.

        Raises:
            CaseError: a rank raised, or did not come back in time. The group is ended.
        """
        for pipe in self._pipes:
            pipe.send((module, case, options))
        return self._gather(case, limit_s)

    def _gather(self, case: str, limit_s: float) -> list[Any]:
        end = time.monotonic() + limit_s
        results: dict[int, Any] = {}
        while len(results) < self.size:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.005):
                    continue
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    error = "the process ended"
                if error:
                    self.end()
                    raise CaseError(f"{case}, rank {rank} of {self.size}: {error}")
            if time.monotonic() > end:
                missing = sorted(set(range(self.size)) - set(results))
                self.end()
                raise CaseError(f"{case}: ranks {missing} did not come back in {limit_s:g} s")
        return [results[rank] for rank in range(self.size)]

    @property
    def is_up(self) -> bool:
        """Whether it can run a case."""
        return bool(self._workers)

    def end(self) -> None:
        """Ends the processes, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers = []
        self._folder.cleanup()


class Groups:
    """Groups by their size, started when they are first asked for and again after a failure."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}

    def __getitem__(self, size: int) -> Group:
        found = self._groups.get(size)
        if found is None or not found.is_up:
            found = self._groups[size] = Group(size)
        return found

    def end(self) -> None:
        """Ends all of them."""
        for group in self._groups.values():
            group.end()


def running() -> Iterator[Groups]:
    """Gives groups for as long as a fixture lives."""
    groups = Groups()
    try:
        yield groups
    finally:
        groups.end()


def _work(pipe: Connection, rank: int, size: int, folder: str, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    # What torchrun sets, which transformers and accelerate read; a file needs no port.
    for name, value in {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "ACCELERATE_USE_CPU": "true",
        "PADLESS_CACHE": f"{folder}/cache",
    }.items():  # fmt: skip
        os.environ[name] = str(value)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    place = Place(rank, size, init_device_mesh("cpu", (size,)), Path(folder))
    pipe.send(("", None))
    while True:
        module, case, options = pipe.recv()
        try:
            torch.manual_seed(0)
            result = getattr(importlib.import_module(module), case)(place, **options)
            pipe.send(("", result))
        except Exception:
            pipe.send((traceback.format_exc(), None))
