"""Where a kernel is launched, and on what.

Triton and graphs take the current device, not that of the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; nothing is entered where it is, or for the CPU.

    To enter torch's own context takes the host microseconds, once a launch.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_gpu(device: torch.device) -> bool:
    """Whether a device is one that Triton's kernels here are for."""
    return device.type == "cuda"


def are_plain(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether a kernel may read tensors by their addresses: whole ones, on one device.

    Subclasses (sharded, fake) need to see torch's own operations.
    """
    return all(type(x) is Tensor and x.device == device and x.is_contiguous() for x in tensors)
