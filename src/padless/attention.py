"""`varlen_attention`: attention within each sequence of a packed batch. Validate, select, call."""

from __future__ import annotations

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import adapter, select_backend


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    *,
    layout_k: VarlenLayout | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attends within each sequence of packed tensors; no sequence sees another.

    Args:
        q: `(total_q, num_heads, head_dim)`, floating.
        k: `(total_k, num_kv_heads, head_dim)`, dtype and device of q; num_heads is a multiple of
            num_kv_heads, and KV heads are not repeated in memory where the backend allows.
        v: shape, dtype and device of k.
        layout: boundaries of the sequences in q, and in k unless layout_k is given.
        layout_k: boundaries in k and v, as many sequences as layout.
        causal: key j is visible to query i if j <= i + seqlen_k - seqlen_q (bottom-right).
        softmax_scale: factor of the scores, default `head_dim ** -0.5`.
        backend: "auto", or the name of one, which is used or raises.

    Returns:
        `(total_q, num_heads, head_dim)` in q's dtype.

    Raises:
        TypeError: dtypes differ, are not floating, or a layout is not a VarlenLayout.
        ValueError: shapes, devices or layouts do not fit each other.
        BackendUnavailableError: the named backend cannot serve the call.

    Note:
        Differentiable in q, k and v. A query that sees no key gives zeros. No host
        synchronisation. q and k may differ in length per sequence (a cache before the queries):

            2 queries, 4 keys:   1 1 1 0
                                 1 1 1 1
    """
    layout_k = layout if layout_k is None else layout_k
    _validate(q, k, v, layout, layout_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if layout.total == 0 or layout_k.total == 0:
        # No query, or no key for any of them; still a function of q for autograd.
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    chosen = select_backend(AttentionRequest.of(q, k), backend)
    out: Tensor = adapter(chosen.name).varlen(
        q, k, v, layout, layout_k, causal=causal, softmax_scale=scale
    )
    return out


def _validate(
    q: Tensor, k: Tensor, v: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> None:
    for name, layout in (("layout", layout_q), ("layout_k", layout_k)):
        if not isinstance(layout, VarlenLayout):
            raise TypeError(
                f"{name} must be a VarlenLayout, got {type(layout).__name__}; "
                f"build one with VarlenLayout.from_mask or .from_cu_seqlens"
            )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape (total, num_heads, head_dim), got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
        if tensor.shape[2] != q.shape[2]:
            raise ValueError(f"{name} must have q's head_dim {q.shape[2]}, got {tensor.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {q.shape[1]} and {k.shape[1]}"
        )
    for name, tensor, layout in (("q", q, layout_q), ("k", k, layout_k)):
        if tensor.shape[0] != layout.total:
            raise ValueError(
                f"{name} must hold the {layout.total} tokens of its layout, got {tensor.shape[0]}"
            )
        if layout.cu_seqlens.device != q.device:
            raise ValueError(
                f"cu_seqlens must be on q's device {q.device}, got {layout.cu_seqlens.device}"
            )
    if len(layout_q.lengths) != len(layout_k.lengths):
        raise ValueError(
            f"layout and layout_k must hold the same number of sequences, "
            f"got {len(layout_q.lengths)} and {len(layout_k.lengths)}"
        )
