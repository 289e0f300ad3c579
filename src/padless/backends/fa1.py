"""FlashAttention-1: `flash_attn` before 2.0, which also runs on Turing.

It has no grouped heads and no window, and aligns causal masks top-left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padless.backends.limits import in_reach, reject_head_dim, token_overflow
from padless.backends.request import AttentionRequest, Window
from padless.environment import import_optional, package_version
from padless.layout import VarlenLayout

NAME = "fa1"

_MODULE = "flash_attn.flash_attn_interface"


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    """Finds the kernel, the names of its arguments, and the reason if there is none."""
    module, reason = import_optional(_MODULE)
    if module is None:
        return None, frozenset(), reason
    kernel = getattr(module, "flash_attn_unpadded_func", None)
    if kernel is None:
        return None, frozenset(), f"flash-attn {version()} has no flash_attn_unpadded_func"
    return kernel, frozenset(inspect.signature(kernel).parameters), ""


@functools.cache
def version() -> str:
    """Returns the version of the distribution flash-attn."""
    return str(package_version("flash-attn") or "unknown")


def reject(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-1 cannot serve the request; None if it can."""
    reason = _reject_gpu(request) or reject_head_dim(request, 128)
    if reason:
        return reason
    if request.num_heads != request.num_kv_heads:
        return (
            f"needs as many KV heads as heads, got {request.num_heads} and {request.num_kv_heads}"
        )
    if request.window_size != (None, None):
        return "takes no window"
    kernel, names, reason = _kernel()
    if kernel is None:
        return reason
    if request.deterministic and request.needs_grad and "deterministic" not in names:
        return f"flash-attn {version()} does not repeat its gradients, 1.0.3 can"
    return None


def _reject_gpu(request: AttentionRequest) -> str | None:
    if request.device_type != "cuda":
        return f"needs CUDA, got {request.device_type}"
    has = torch.cuda.get_device_capability(request.device)
    if torch.version.hip is not None or has[0] not in (7, 8, 9) or has < (7, 5):
        return f"needs compute capability 7.5, 8.x or 9.0, got {has}"
    dtypes = (torch.float16,) if has == (7, 5) else (torch.float16, torch.bfloat16)
    if request.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"needs {names} on compute capability {has}, got {request.dtype}"
    if request.needs_grad and request.head_dim > 64 and has not in ((8, 0), (9, 0)):
        return f"needs head_dim up to 64 for gradients on compute capability {has}"
    return None


def reject_layout(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why the kernel cannot serve these lengths; None if it can."""
    if 0 in layout_q.lengths or 0 in layout_k.lengths:
        return "takes no empty sequence"
    if request.causal and layout_q.lengths != layout_k.lengths:
        return "aligns causal masks top-left: needs as many keys as queries in each sequence"
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
    options = {"deterministic": True} if deterministic and "deterministic" in names else {}
    with torch.cuda.device_of(q):
        out: Tensor = kernel(
            *(in_reach(x) for x in (q, k, v)),
            layout_q.cu_seqlens,
            layout_k.cu_seqlens,
            layout_q.max_seqlen,
            layout_k.max_seqlen,
            0.0,
            softmax_scale=softmax_scale,
            causal=causal,
            **options,
        )
    return out
