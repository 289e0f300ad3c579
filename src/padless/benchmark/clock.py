"""Clocks: CUDA events on a GPU, the host's own on a CPU. And what a machine can do at most."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch

# Written between measurements, for a millisecond or two on a Hopper GPU: each sees cold caches, and
# launches that run ahead of the device, as they do inside a long model.
_LEAD_BYTES = 256 * 2**20
_LEAD_WRITES = 20


class Clock:
    """Marks points in time on a device, and reads them afterwards.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self._lead: torch.Tensor | None = None
        if self.is_cuda:
            self._lead = torch.empty(_LEAD_BYTES, dtype=torch.uint8, device=device)

    def lead(self) -> None:
        """Clears the caches, and gives the device something to do meanwhile."""
        if self._lead is not None:
            for _ in range(_LEAD_WRITES):
                self._lead.zero_()

    def mark(self) -> Any:
        """Marks the point that the device has reached."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Waits until the device has done all that it was asked."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Reads the time between two marks, after `settle`."""
        if self.is_cuda:
            return float(start.elapsed_time(end))
        return float(end - start) * 1e3

    def forget_peak(self) -> None:
        """Begins a new count of the highest memory use."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def held_bytes(self) -> int | None:
        """Reads the memory in tensors that are alive now; None on a CPU."""
        if self._lead is None:
            return None
        return torch.cuda.memory_allocated() - self._lead.numel()

    def peak_bytes(self) -> int | None:
        """Reads the highest memory use in tensors; None on a CPU, where nobody counts it."""
        if self._lead is None:
            return None
        return torch.cuda.max_memory_allocated() - self._lead.numel()


class Ceilings(NamedTuple):
    """What the device does at most, measured in the same run.

    Attributes:
        matmul_tflops: of a square matrix product on random data.
        matmul_size: rows and columns of its operands.
        matmul_dtype: of its operands.
        copy_tb_s: of a copy, bytes read and bytes written.
        copy_bytes: bytes that it read.
    """

    matmul_tflops: float
    matmul_size: int
    matmul_dtype: str
    copy_tb_s: float
    copy_bytes: int


def measure_ceilings(
    clock: Clock, *, smoke: bool = False, repeats: int = 20, dtype: torch.dtype | None = None
) -> Ceilings:
    """Measures a matrix product and a copy: the median on a GPU, the fastest on a CPU.

    On a CPU other programs take time away, and nothing ever gives some; a GPU runs for a moment at
    clocks that it does not keep.

    Args:
        clock: of the device.
        smoke: whether to take sizes that only show that it runs.
        repeats: of each.
        dtype: of the product; default bfloat16 on a GPU and float32 on a CPU.
    """
    device = "cuda" if clock.is_cuda else "cpu"
    size, copy_bytes = (8192, 2**31) if clock.is_cuda else (1024, 2**26)
    if smoke:
        size, copy_bytes, repeats = 128, 2**16, 3
    if dtype is None:
        dtype = torch.bfloat16 if clock.is_cuda else torch.float32
    # Random: a product of zeros runs faster than real data does.
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    product_ms = _usual_ms(clock, lambda: torch.mm(a, b), repeats)
    copy_ms = _usual_ms(clock, lambda: target.copy_(source), repeats)
    return Ceilings(
        matmul_tflops=2 * size**3 / product_ms / 1e9,
        matmul_size=size,
        matmul_dtype=str(dtype).removeprefix("torch."),
        copy_tb_s=2 * copy_bytes / copy_ms / 1e9,
        copy_bytes=copy_bytes,
    )


def _usual_ms(clock: Clock, run: Any, repeats: int) -> float:
    for _ in range(3):
        run()
    marks = [clock.mark()]
    for _ in range(repeats):
        run()
        marks.append(clock.mark())
    clock.settle()
    found = [clock.elapsed_ms(a, b) for a, b in pairwise(marks)]
    return statistics.median(found) if clock.is_cuda else min(found)
