"""FlashAttention-2: `flash_attn` 2.1 and later, for Ampere and newer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from padless.backends.limits import (
    flash2_scratch_overflow,
    in_reach,
    reject_flash2_head_dim,
    reject_flash2_window,
    reject_gpu,
)
from padless.backends.request import AttentionRequest, Window
from padless.environment import import_optional, package_version
from padless.layout import VarlenLayout

NAME = "fa2"
QUICK_TO_LAUNCH = True

_MODULE = "flash_attn.flash_attn_interface"
# 2.0 aligned causal masks top-left.
_OLDEST = Version("2.1")


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    """Finds the kernel, the names of its arguments, and the reason if there is none."""
    module, reason = import_optional(_MODULE)
    if module is None:
        return None, frozenset(), reason
    kernel = getattr(module, "flash_attn_varlen_func", None)
    if kernel is None:
        return None, frozenset(), f"flash-attn {version()} has no flash_attn_varlen_func"
    installed = package_version("flash-attn")
    if installed is None or installed < _OLDEST:
        return None, frozenset(), f"needs flash-attn {_OLDEST} or later, got {version()}"
    return kernel, frozenset(inspect.signature(kernel).parameters), ""


@functools.cache
def version() -> str:
    """Returns the version of the distribution flash-attn."""
    return str(package_version("flash-attn") or "unknown")


def reject(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-2 cannot serve the request; None if it can."""
    reason = reject_gpu(request) or reject_flash2_head_dim(request) or reject_flash2_window(request)
    if reason:
        return reason
    kernel, names, reason = _kernel()
    if kernel is None:
        return reason
    if request.window_size != (None, None) and "window_size" not in names:
        return f"flash-attn {version()} takes no window, 2.3 does"
    if request.deterministic and request.needs_grad and "deterministic" not in names:
        return f"flash-attn {version()} does not repeat its gradients, 2.4.1 can"
    return None


def reject_layout(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why the kernel cannot serve a batch of this size; None if it can."""
    return flash2_scratch_overflow(request, layout_q)


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
    if deterministic and "deterministic" in names:
        options["deterministic"] = True
    max_seqlen_q = layout_q.max_seqlen
    if max_seqlen_q == 1 and layout_q.total < len(layout_q.lengths):
        # At one query each the kernel takes its grouped heads for queries, and fails if a sequence
        # has none. An upper bound keeps it from that and changes no result.
        max_seqlen_q = 2
    with torch.cuda.device_of(q):
        out: Tensor = kernel(
            *(in_reach(x) for x in (q, k, v)),
            layout_q.cu_seqlens,
            layout_k.cu_seqlens,
            max_seqlen_q,
            layout_k.max_seqlen,
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=causal,
            **options,
        )
    return out
