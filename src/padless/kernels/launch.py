"""Where a kernel is launched: Triton and graphs take the current device, not that of the data."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; nothing is entered where it is, or for the CPU.

    To enter torch's own context takes the host microseconds, once a launch.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
