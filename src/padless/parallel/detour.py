"""Kernels of other streams begin in front of this one's next."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Kernels of about a microsecond each.
_KERNELS = 2


def let_begin(device: torch.device) -> None:
    """Lets what was just launched on other streams begin before what comes next on this one.

    NCCL's kernel waits for what stands on this stream, and so does the next kernel of this stream,
    which is there some microseconds earlier: if it is attention's, it takes every multiprocessor,
    and the exchange stands alone behind it. Here this stream goes round by another one, where some
    small kernels wait for the same.

    Args:
        device: a CUDA device.
    """
    here = torch.cuda.current_stream(device)
    way, number = _detour(device)
    way.wait_stream(here)
    with torch.cuda.stream(way):
        for _ in range(_KERNELS):
            number.zero_()
    here.wait_stream(way)


@functools.cache
def _detour(device: torch.device) -> tuple[torch.cuda.Stream, Tensor]:
    return torch.cuda.Stream(device), torch.zeros(1, device=device)
