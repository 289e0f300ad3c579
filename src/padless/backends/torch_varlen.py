"""FlashAttention-2 as torch carries it: `torch.nn.attention.varlen` on CUDA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.environment import import_optional
from padless.layout import VarlenLayout

NAME = "torch_varlen"


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    module, _ = import_optional("torch.nn.attention.varlen")
    kernel = getattr(module, "varlen_attn", None)
    names = frozenset(inspect.signature(kernel).parameters) if kernel else frozenset()
    return kernel, names


def reject(request: AttentionRequest) -> str | None:
    """Says why torch's varlen kernel cannot serve the request; None if it can."""
    if request.device_type != "cuda":
        return f"needs CUDA, got {request.device_type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {request.dtype}"
    if request.head_dim > 256 or request.head_dim % 8:
        return f"needs head_dim a multiple of 8 up to 256, got {request.head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0, got {torch.cuda.get_device_capability()}"
    if _kernel()[0] is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Attends within each sequence; see `padless.varlen_attention` for the arguments."""
    kernel, names = _kernel()
    assert kernel is not None  # reject() has said so otherwise
    options: dict[str, Any] = {"scale": softmax_scale}
    # The spelling of causal changed from a flag to a window while the kernel was new.
    if "window_size" in names:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    max_seqlen_q = layout_q.max_seqlen
    if max_seqlen_q == 1 and layout_q.total < len(layout_q.lengths):
        # At one query each the kernel takes its grouped heads for queries, and fails if a sequence
        # has none. An upper bound keeps it from that and changes no result.
        max_seqlen_q = 2
    # The kernel refuses a head whose numbers do not lie side by side.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out: Tensor = kernel(
        q,
        k,
        v,
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        max_seqlen_q,
        layout_k.max_seqlen,
        **options,
    )
    return out
