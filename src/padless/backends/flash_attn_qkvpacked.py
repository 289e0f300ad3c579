"""An installed flash-attn v1 or v2, called by its packed contract: one qkv tensor, MHA.

v1 names the kernel `flash_attn_unpadded_qkvpacked_func`, v2 `flash_attn_varlen_qkvpacked_func`; the
arguments that both take are the same.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from padless.environment import import_optional
from padless.layout import VarlenLayout

NAMES = {
    "flash_attn_unpadded_qkvpacked_func": "fa1",
    "flash_attn_varlen_qkvpacked_func": "fa2",
}

_MODULE = "flash_attn.flash_attn_interface"

_logger = logging.getLogger("padless")
_refused: set[tuple[Any, ...]] = set()


def find_kernel() -> tuple[str, Callable[..., Any] | None, str]:
    """Looks for the packed kernel of an installed flash-attn.

    Returns:
        Backend name, kernel and an empty string; or an empty name, None and the reason.
    """
    module = sys.modules.get(_MODULE)
    reason = ""
    if module is None:
        module, reason = _import_once()
    if module is None:
        return "", None, reason
    for function, name in NAMES.items():
        kernel = getattr(module, function, None)
        if kernel is not None:
            return name, kernel, ""
    return "", None, f"flash_attn has none of {', '.join(NAMES)}"


@functools.cache
def _import_once() -> tuple[ModuleType | None, str]:
    # Python does not remember a failed import: it would be tried again in every layer.
    return import_optional(_MODULE)


def qkvpacked_attention(
    qkv: Tensor, layout: VarlenLayout, *, causal: bool, softmax_scale: float
) -> tuple[str, Tensor] | None:
    """Runs the installed packed kernel, if there is one and it takes this call.

    Args:
        qkv: `(total, 3, num_heads, head_dim)`.
        layout: boundaries of the packed sequences.
        causal: bottom-right aligned.
        softmax_scale: factor of the scores.

    Returns:
        The backend's name and `(total, num_heads, head_dim)`; None when there is no such kernel
        or it refuses the call (wrong dtype, device or head_dim for it), which is logged once.
    """
    name, kernel, _ = find_kernel()
    if kernel is None or layout.total == 0:
        return None
    # The package knows best what it takes (dtype, head_dim, device): a refusal is remembered by
    # what was asked, so that it is asked once.
    asked = (kernel, qkv.device.type, qkv.dtype, qkv.shape[-1])
    if asked in _refused:
        return None
    try:
        out = kernel(
            qkv,
            layout.cu_seqlens,
            layout.max_seqlen,
            0.0,
            softmax_scale=softmax_scale,
            causal=causal,
        )
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error" in str(error):
            # Not a refusal: the device ran out of memory, or is broken for this process.
            raise
        _refused.add(asked)
        _logger.warning(
            "the installed flash-attn refuses %s on %s with head_dim %d (%s); "
            "padless uses its own backends instead",
            qkv.dtype,
            qkv.device.type,
            qkv.shape[-1],
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return None
    return name, out
