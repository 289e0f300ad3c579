"""A variant that cannot be had or fails: its reason in one line, and the memory that it held."""

from __future__ import annotations

import gc
import logging

import torch

from padless.benchmark.variant import Timing, WrongNumbersError

_logger = logging.getLogger(__name__)


def give_up(timing: Timing, error: Exception) -> None:
    """Makes an error the reason of a row that will have no figures."""
    if timing.reason is None:
        timing.reason = _in_one_line(error)
        _logger.warning("%s: %s", timing.name, timing.reason)
    timing.samples.clear()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, on a GPU or a CPU."""
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_cpu or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, WrongNumbersError):
        return f"wrong numbers: {text}"
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:240]


def free_memory() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            # The device is past use; the other rows will say so themselves.
            return
