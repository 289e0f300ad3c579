"""What flash kernels have in common: GPU, heads and strides that they take, reach of their indices.

Past that reach a kernel reads and writes elsewhere, mostly without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

INT32 = 2**31


def reject_gpu(request: AttentionRequest, *, major: tuple[int, ...] | None = None) -> str | None:
    """Says why no flash kernel takes the request's device and dtype; None if one may.

    Args:
        request: what is asked.
        major: compute capabilities, by their first number; None for 8.0 and later.
    """
    if request.device_type != "cuda":
        return f"needs CUDA, got {request.device_type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {request.dtype}"
    if torch.version.hip is not None:
        # AMD counts otherwise: there the number says nothing.
        return None if major is None else "needs an NVIDIA GPU, got an AMD one"
    has = torch.cuda.get_device_capability(request.device)
    if major is not None and has[0] not in major:
        needs = " or ".join(f"{n}.x" for n in major)
        return f"needs compute capability {needs}, got {has}"
    if has < (8, 0):
        return f"needs compute capability 8.0, got {has}"
    return None


def reject_head_dim(request: AttentionRequest, largest: int = 256) -> str | None:
    """Says why no flash kernel takes heads of this size; None if one may."""
    if request.head_dim > largest or request.head_dim % 8:
        return f"needs head_dim a multiple of 8 up to {largest}, got {request.head_dim}"
    return None


def reject_flash2_head_dim(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-2 does not take heads of this size; None if it does."""
    reason = reject_head_dim(request)
    if reason or not request.needs_grad or request.head_dim <= 192 or torch.version.hip:
        return reason
    has = torch.cuda.get_device_capability(request.device)
    if has[0] in (8, 12) and has != (8, 0):
        # Too little shared memory for the backward.
        return f"needs head_dim up to 192 for gradients on compute capability {has}"
    return None


def reject_flash2_window(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-2 cannot serve a window that is open on the right.

    It takes the longest keys for such a bound, counted from a query's own key, and so hides keys
    from queries of a sequence that has fewer keys than queries (seen on an H200 in torch 2.11).
    """
    left, right = request.window_size
    if left is not None and right is None and not request.causal:
        return "hides keys of a window that is bounded on the left alone"
    return None


def flash2_scratch_overflow(request: AttentionRequest, layout_q: VarlenLayout) -> str | None:
    """Says whether the scratch of FlashAttention-2's backward is past its indices; None if not.

    dq is added up in a float32 buffer that has 128 rows to spare for each sequence, and is
    indexed by an int: `(row + 128 * sequence) * num_heads * rounded head_dim`.

    Source: Dao-AILab/flash-attention PR 1500 (2.8.0) and PR 2260; to be dropped with torch and
    flash-attn versions that carry neither.
    """
    if not request.needs_grad:
        return None
    n = len(layout_q.lengths)
    heads = request.num_heads * _flash2_rounded(request.head_dim)
    longest = -(-layout_q.max_seqlen // 128) * 128
    if (longest + 128 * n) * heads < INT32:
        return None
    return (
        f"the scratch of its backward would pass 2**31 numbers: {n} sequences of up to "
        f"{layout_q.max_seqlen} tokens, {request.num_heads} heads of {request.head_dim}"
    )


def token_overflow(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says whether q or k are past the reach of 32-bit offsets; None if not."""
    largest = max(layout_q.total * request.num_heads, layout_k.total * request.num_kv_heads)
    if largest * request.head_dim < INT32:
        return None
    return (
        f"its offsets reach fewer than 2**31 numbers: {layout_q.total} queries in "
        f"{request.num_heads} heads of {request.head_dim}, {layout_k.total} keys in "
        f"{request.num_kv_heads}"
    )


def _flash2_rounded(head_dim: int) -> int:
    step = 32 if head_dim <= 128 else 64
    return 256 if head_dim > 192 else -(-head_dim // step) * step


def in_reach(x: Tensor) -> Tensor:
    """Copies a tensor that the kernels' loads do not fit; any other stays as it is.

    They load 16 bytes at a time: numbers of a head side by side, all else a multiple of that apart.
    """
    aligned = x.stride(-1) == 1 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:-1])
    if aligned and x.data_ptr() % 16 == 0 and x.shape[0] * x.stride(0) < INT32:
        return x
    return x.clone(memory_format=torch.contiguous_format)
