"""Whether Triton works on a GPU: that it imports says little.

It compiles at the first launch, for which it needs a C compiler and a driver that suit it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from padless.environment import import_optional


def triton_fault(trial: Callable[[torch.device], None], device: torch.device) -> str | None:
    """Says why a Triton kernel cannot be used on a GPU; None if it can.

    Args:
        trial: runs the kernel on a few numbers, and raises if they are wrong.
        device: the GPU.
    """
    module, reason = import_optional("triton")
    if module is None:
        return reason
    try:
        with torch.no_grad():
            trial(device)
    except Exception as error:
        # Whatever a broken installation raises: torch can do without it.
        lines = str(error).splitlines() or [""]
        return f"Triton's kernel failed its trial: {type(error).__name__}: {lines[0]}"
    return None


def faults_by(trial: Callable[[torch.device], None]) -> Callable[[torch.device], str | None]:
    """Makes what says why a kernel cannot be used on a GPU, tried once on each.

    Args:
        trial: as for `triton_fault`.
    """
    return functools.cache(functools.partial(triton_fault, trial))
