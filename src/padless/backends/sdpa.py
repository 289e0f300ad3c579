"""torch's scaled dot product attention: runs anywhere, one call a sequence, or one in all.

Heads-first layouts stay inside this file and `hf`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.environment import has_sdpa, has_sdpa_gqa
from padless.layout import VarlenLayout
from padless.reference import causal_visible

NAME = "sdpa"


def reject(request: AttentionRequest) -> str | None:
    """Says why SDPA cannot serve the request; None if it can."""
    if not has_sdpa():
        return "torch has no scaled_dot_product_attention (2.0 and later have it)"
    if not request.dtype.is_floating_point:
        return f"needs a floating dtype, got {request.dtype}"
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
    lengths = list(zip(layout_q.lengths, layout_k.lengths, strict=True))
    if len(set(lengths)) == 1 and lengths[0] != (0, 0):
        # Equal lengths need no loop: the packed tensors are a dense batch already.
        n, (seqlen_q, seqlen_k) = len(lengths), lengths[0]
        dense = _one_length(
            q.reshape(n, seqlen_q, *q.shape[1:]),
            k.reshape(n, seqlen_k, *k.shape[1:]),
            v.reshape(n, seqlen_k, *v.shape[1:]),
            causal=causal,
            softmax_scale=softmax_scale,
        )
        return dense.reshape(q.shape)
    pieces = [
        _one_length(q_i[None], k_i[None], v_i[None], causal=causal, softmax_scale=softmax_scale)[0]
        for q_i, k_i, v_i in zip(
            layout_q.split(q), layout_k.split(k), layout_k.split(v), strict=True
        )
        if q_i.shape[0]
    ]
    return torch.cat(pieces) if pieces else torch.zeros_like(q)


def _one_length(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Attends in a dense batch of sequences `(n, s, h, d)` that all have one length."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if seqlen_k == 0:
        # Zeros that are still a function of q for autograd.
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    no_key = seqlen_q - seqlen_k if causal else 0
    if no_key > 0:
        # The first rows see no key, and kernels disagree on what such a row gives (some NaN, also
        # in gradients): it is zero here. The rest is square.
        rest = _one_length(q[:, no_key:], k, v, causal=True, softmax_scale=softmax_scale)
        return F.pad(rest, (0, 0, 0, 0, no_key, 0))
    # SDPA's is_causal is aligned top-left: right only where both lengths are the same.
    square = seqlen_q == seqlen_k
    mask = None
    if causal and not square and seqlen_q > 1:
        mask = causal_visible(seqlen_q, seqlen_k, q.device)
    return dense_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask=mask,
        is_causal=causal and square and seqlen_q > 1,
        softmax_scale=softmax_scale,
    ).transpose(1, 2)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Calls SDPA with grouped KV heads on every torch, and never by way of cuDNN.

    Args:
        q: `(batch, num_heads, seqlen_q, head_dim)`.
        k: `(batch, num_kv_heads, seqlen_k, head_dim)`.
        v: like k.
        mask: bool (True = attend) or additive float, broadcastable to
            `(batch, num_heads, seqlen_q, seqlen_k)`; not together with is_causal.
        is_causal: top-left aligned, as SDPA has it.
        softmax_scale: factor of the scores.
        dropout_p: share of the weights dropped.

    Returns:
        `(batch, num_heads, seqlen_q, head_dim)`.
    """
    grouped = q.shape[1] != k.shape[1]
    extra = {}
    # On CUDA only the flash kernel takes grouped heads: half types, no mask, heads of 256 at most.
    # Where it cannot run, grouped heads would go to the math kernel: expand there.
    flash = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
    if grouped and has_sdpa_gqa() and (flash or not q.is_cuda):
        extra["enable_gqa"] = True
    elif grouped:
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    with _without_cudnn(q):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=softmax_scale,
            **extra,
        )


def _without_cudnn(q: Tensor) -> AbstractContextManager[None]:
    """Keeps SDPA off cuDNN, which plans for tens of milliseconds at each length it has not met."""
    if not q.is_cuda:
        return nullcontext()
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        # torch before 2.3: SDPA has no cuDNN kernel there.
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
