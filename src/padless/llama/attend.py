"""How the original's two forwards attend: on real tokens, by SDPA, or explicitly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from padless.attention import varlen_attention
from padless.backends.flash_attn_qkvpacked import qkvpacked_attention
from padless.backends.request import AttentionRequest
from padless.backends.sdpa import dense_attention
from padless.environment import has_sdpa
from padless.hf.attention import Projected
from padless.hf.call import LayerCall
from padless.hf.masks import PackedMask
from padless.selection import select_backend


class Attended(NamedTuple):
    """What attention gave.

    Attributes:
        backend: what computed it.
        out: `(batch, seqlen_q, num_heads, head_dim)`.
        weights: `(batch, num_heads, seqlen_q, seqlen_k)` if they were asked for.
        computed_tokens: queries that were computed.
    """

    backend: str
    out: Tensor
    weights: Tensor | None
    computed_tokens: int


def attend_flash(module: nn.Module, call: LayerCall, p: Projected) -> Attended:
    """Attends as `forward` does: packed wherever the mask is padding, else exactly as masked."""
    tokens = p.q.shape[0] * p.q.shape[2]
    dropout_p = _dropout(module)
    if call.output_attentions:
        return Attended("explicit", *_explicitly(p, dropout_p), tokens)
    # The packed backends have no dropout.
    packed = p.mask.packed() if dropout_p == 0.0 else None
    if packed is None and not has_sdpa():
        return Attended("explicit", _explicitly(p, dropout_p)[0], None, tokens)
    if packed is None:
        return Attended("sdpa_masked", _with_sdpa(p, dropout_p), None, tokens)
    backend, out = _packed(p, packed)
    return Attended(backend, out, None, packed.layout_q.total)


def attend_2(module: nn.Module, call: LayerCall, p: Projected) -> Attended:
    """Attends as `forward_2` does: by SDPA in training, explicitly in evaluation."""
    tokens = p.q.shape[0] * p.q.shape[2]
    if module.training and not call.output_attentions:
        return Attended("sdpa", _with_sdpa(p, _dropout(module)), None, tokens)
    out, weights = _explicitly(p, _dropout(module))
    return Attended("explicit", out, weights if call.output_attentions else None, tokens)


def _dropout(module: nn.Module) -> float:
    # The config has had a dropout for attention since 4.36; it is 0 unless a user sets it.
    return float(getattr(module, "attention_dropout", 0.0)) if module.training else 0.0


def _explicitly(p: Projected, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Computes scores by a matrix product, softmax in float32, and the weighted sum.

    Args:
        p: queries, keys, values and their mask.
        dropout_p: share of the weights dropped; 0 outside training.

    Returns:
        Output `(batch, seqlen_q, num_heads, head_dim)` and weights
        `(batch, num_heads, seqlen_q, seqlen_k)`, both in q's dtype.
    """
    batch, num_heads, seqlen_q, head_dim = p.q.shape
    num_kv_heads, seqlen_k = p.k.shape[1:3]
    # The query heads of a group side by side in the rows: keys and values are never repeated.
    q = p.q.reshape(batch, num_kv_heads, -1, head_dim)  # (b, hkv, groups * s, d)
    scores = torch.matmul(q, p.k.transpose(2, 3)) * p.softmax_scale
    scores = scores.float().view(batch, num_heads, seqlen_q, seqlen_k)
    mask = p.mask.dense()
    if mask is not None:
        lowest = torch.finfo(torch.float32).min
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, lowest)
        else:
            # A row of -inf alone would be NaN; at the lowest number it is uniform and not read.
            scores = (scores + mask.float()).clamp(min=lowest)
    weights = scores.softmax(-1).to(p.q.dtype)
    kept = torch.nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    out = torch.matmul(kept.view(batch, num_kv_heads, -1, seqlen_k), p.v)
    out = out.view(batch, num_heads, seqlen_q, head_dim)
    return out.transpose(1, 2), weights


def _with_sdpa(p: Projected, dropout_p: float) -> Tensor:
    """Calls SDPA, causal without a mask wherever that computes the same for real tokens.

    With padding on the right no real query can see padding under the causal mask, so that the mask
    need not be read; with padding on the left it must be.

    Returns:
        `(batch, seqlen_q, num_heads, head_dim)`.
    """
    packed = p.mask.packed()
    square = p.q.shape[2] == p.k.shape[2]
    is_causal = square and packed is not None and packed.causal_suffices
    out = dense_attention(
        p.q,
        p.k,
        p.v,
        mask=None if is_causal else p.mask.visible(),
        is_causal=is_causal,
        softmax_scale=p.softmax_scale,
        dropout_p=dropout_p,
    )
    return out.transpose(1, 2)


def _packed(p: Projected, packed: PackedMask) -> tuple[str, Tensor]:
    """Attends over real tokens only: unpads, runs a packed kernel, pads back with zeros.

    Returns:
        The backend's name and `(batch, seqlen_q, num_heads, head_dim)`.
    """
    layout_q, layout_k = packed.layout_q, packed.layout_k
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))  # (b, s, h, d)
    if q.shape == k.shape:
        qkv = layout_q.unpad(torch.stack([q, k, v], dim=2))  # (total, 3, h, d)
        served = qkvpacked_attention(qkv, layout_q, causal=True, softmax_scale=p.softmax_scale)
        if served is not None:
            return served[0], layout_q.pad(served[1])
        q, k, v = qkv.unbind(1)
    else:
        q, k, v = layout_q.unpad(q), layout_k.unpad(k), layout_k.unpad(v)
    out = varlen_attention(q, k, v, layout_q, layout_k=layout_k, softmax_scale=p.softmax_scale)
    # Asked apart: to name it above would take it as it is, wrong heads and all.
    return select_backend(AttentionRequest.of(q, k)).name, layout_q.pad(out)
