"""Processes that are started once for many tests, with a hard limit on each of their jobs.

A job is a function of a module, by name, so that nothing but its arguments and result is pickled.
A hang, which is what most faults of collectives are, ends the pool and fails the test.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing as mp
import pickle
import tempfile
import traceback
from multiprocessing.connection import wait
from typing import Any

LIMIT_S = 60.0


class Pool:
    """Ranks of a gloo group, each waiting for jobs."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("spawn")
        folder = tempfile.mkdtemp()
        self._ends: list[Any] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, size, folder), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        # Imports of torch on few cores are slow, and are not what is tested.
        self._answers("starting", 180.0)

    def run(self, job: str, *arguments: Any) -> list[Any]:
        """Runs `module:function(*arguments)` on every rank; returns what each returned."""
        for end in self._ends:
            end.send_bytes(pickle.dumps((job, arguments)))
        return self._answers(job, LIMIT_S)

    def _answers(self, job: str, limit_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        waiting = dict(enumerate(self._ends))
        while waiting:
            ready = wait(list(waiting.values()), timeout=limit_s)
            if not ready:
                self.close()
                raise AssertionError(f"{job}: ranks {sorted(waiting)} hang after {limit_s} s")
            for rank, end in list(waiting.items()):
                if end in ready:
                    del waiting[rank]
                    kind, value = pickle.loads(end.recv_bytes())
                    if kind == "error":
                        # The others may wait for it in a collective.
                        self.close()
                        raise AssertionError(f"{job} on rank {rank} of {self.size}:\n{value}")
                    answers[rank] = value
        return [answers[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes; a later test starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        pool.cache_clear()


@functools.cache
def pool(size: int) -> Pool:
    """The pool of this size."""
    return Pool(size)


def _work(end: Any, rank: int, size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    _tell(end, "ok", None)
    while True:
        try:
            job, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        module, _, function = job.partition(":")
        try:
            _tell(end, "ok", getattr(importlib.import_module(module), function)(*arguments))
        except BaseException:
            _tell(end, "error", traceback.format_exc())


def _tell(end: Any, kind: str, value: Any) -> None:
    # Bytes: torch's own way to send tensors is memory that both ends have to keep open.
    end.send_bytes(pickle.dumps((kind, value)))
