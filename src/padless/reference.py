"""Attention by its formula, in any float dtype: the definition of right that tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Computes softmax(q k^T * scale) v with grouped KV heads, nothing fused.

    Args:
        q: `(batch, seqlen_q, num_heads, head_dim)`, any float dtype.
        k: `(batch, seqlen_k, num_kv_heads, head_dim)`.
        v: like k.
        visible: bool, broadcastable to `(batch, num_heads, seqlen_q, seqlen_k)`, True = attend.
        softmax_scale: defaults to `head_dim ** -0.5`.

    Returns:
        `(batch, seqlen_q, num_heads, head_dim)`; queries that see no key give zeros.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if visible is None:
        return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    scores = scores.masked_fill(~visible, float("-inf"))
    # A row without a visible key would be 0/0: softmax over zeros instead, then drop it.
    nothing_visible = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(nothing_visible, 0.0).softmax(-1)
    weights = weights.masked_fill(~visible, 0.0)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (None, None),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Builds the mask of one sequence, aligned bottom-right: the last query meets the last key.

    Key j is visible to query i if `at - left <= j <= at + right`, where `at = i + seqlen_k -
    seqlen_q` and `(left, right) = window_size`; None is no bound, and causal makes right 0. For 2
    queries and 4 keys, causal, without and with the window `(1, 0)`:

        1 1 1 0        0 1 1 0
        1 1 1 1        0 0 1 1

    Returns:
        bool `(seqlen_q, seqlen_k)`, True = attend.
    """
    left, right = window_size
    right = 0 if causal else right
    at = torch.arange(seqlen_q, device=device).unsqueeze(1) + (seqlen_k - seqlen_q)
    keys = torch.arange(seqlen_k, device=device).unsqueeze(0)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        visible &= keys >= at - left
    if right is not None:
        visible &= keys <= at + right
    return visible


def causal_visible(seqlen_q: int, seqlen_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Builds the causal mask `(seqlen_q, seqlen_k)`: `visible_keys` without a window."""
    return visible_keys(seqlen_q, seqlen_k, device=device)
