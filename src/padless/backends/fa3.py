"""FlashAttention-3, built from source as `flash_attn_interface`, for Hopper."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padless.backends.limits import in_reach, reject_gpu, reject_head_dim, token_overflow
from padless.backends.request import AttentionRequest, Window
from padless.environment import import_optional, package_version
from padless.layout import VarlenLayout

NAME = "fa3"
QUICK_TO_LAUNCH = True

_MODULE = "flash_attn_interface"
_NEEDED = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
)


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    """Finds the kernel, the names of its arguments, and the reason if there is none."""
    module, reason = import_optional(_MODULE)
    kernel = getattr(module, "flash_attn_varlen_func", None)
    if kernel is None:
        return None, frozenset(), reason or f"{_MODULE} has no flash_attn_varlen_func"
    names = frozenset(inspect.signature(kernel).parameters)
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        return None, names, f"flash_attn_varlen_func of {_MODULE} takes no {missing[0]}"
    return kernel, names, ""


@functools.cache
def version() -> str:
    """Returns the version of the distribution flash-attn-3."""
    return str(package_version("flash-attn-3") or "unknown")


def reject(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-3 cannot serve the request; None if it can."""
    reason = reject_gpu(request, major=(9,)) or reject_head_dim(request)
    if reason:
        return reason
    if request.deterministic and request.needs_grad:
        # flash-attention issue 2244: its own flag does not always keep the promise.
        return "does not repeat its gradients"
    kernel, names, reason = _kernel()
    if kernel is None:
        return reason
    if request.window_size != (None, None) and "window_size" not in names:
        return "this flash-attn-3 takes no window"
    return None


def reject_layout(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why the kernel cannot serve a batch of this size; None if it can."""
    return token_overflow(request, layout_q, layout_k)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> Tensor:
    """Attends within each sequence; see `padless.varlen_attention` for the arguments."""
    kernel, names, _ = _kernel()
    assert kernel is not None  # reject() has said so otherwise
    options: dict[str, Any] = {}
    if window_size != (None, None):
        options["window_size"] = tuple(-1 if bound is None else bound for bound in window_size)
    if "num_splits" in names:
        # Of its own accord it may split keys by the batch's shape: other sums, other roundings.
        options["num_splits"] = 1
    with torch.cuda.device_of(q):
        result = kernel(
            *(in_reach(x) for x in (q, k, v)),
            cu_seqlens_q=layout_q.cu_seqlens,
            cu_seqlens_k=layout_k.cu_seqlens,
            max_seqlen_q=layout_q.max_seqlen,
            max_seqlen_k=layout_k.max_seqlen,
            softmax_scale=softmax_scale,
            causal=causal,
            **options,
        )
    # With its lse in versions before 2025-10, alone since then.
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
