"""Stand-ins for FlashAttention-1 to 3 and for torch's: signatures, refusals, the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_checks import (
    attend_within,
    bottom_right,
    check_boundaries,
    check_grouped_queries,
    check_tensors,
    from_minus_one,
    go_back,
)


def fa3_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_interface` of 2025-10 and later."""
    assert (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, pack_gqa) == (None,) * 7
    assert (attention_chunk, softcap, sm_margin) == (0, 0.0, 0)
    # Left to itself it would decide by the shape of the batch.
    assert num_splits == 1
    assert (deterministic, return_attn_probs) == (False, False)
    return _flash2(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale,
        bottom_right(causal, from_minus_one(window_size)),
    )


def fa3_varlen_early(*tensors: Any, **options: Any) -> tuple[Tensor, None]:
    """The same before that: with its lse."""
    return fa3_varlen(*tensors, **options), None


fa3_varlen_early.__wrapped__ = fa3_varlen  # type: ignore[attr-defined]  # its signature


def fa2_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn` 2.8."""
    assert (dropout_p, softcap, alibi_slopes, block_table) == (0.0, 0.0, None, None)
    assert return_attn_probs is False
    assert type(deterministic) is bool
    check_grouped_queries(q, k, cu_seqlens_q, max_seqlen_q)
    return _flash2(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale,
        bottom_right(causal, from_minus_one(window_size)),
    )


def fa2_varlen_early(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """2.1: no window, gradients in any order."""
    return fa2_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        return_attn_probs=return_attn_probs,
    )


def _flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[Any, ...],
    softmax_scale: float | None,
    visible: Callable[[int, int], Tensor],
) -> Tensor:
    check_tensors(q, k, v)
    check_boundaries(q, k, *boundaries)
    assert type(softmax_scale) is float
    return attend_within(q, k, v, *boundaries[:2], visible, softmax_scale)[0]


def fa1_unpadded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn` 1.0.9: as many KV heads as heads, masks aligned top-left."""
    assert (dropout_p, return_attn_probs) == (0.0, False)
    assert q.shape[1:] == k.shape[1:]
    check_tensors(q, k, v, 128)
    boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_boundaries(q, k, *boundaries)
    assert all(cu_seqlens.diff().min() > 0 for cu_seqlens in boundaries[:2])
    assert type(softmax_scale) is float

    def top_left(n: int, m: int) -> Tensor:
        everything = torch.ones(n, m, dtype=torch.bool)
        return everything.tril() if causal else everything

    return attend_within(q, k, v, cu_seqlens_q, cu_seqlens_k, top_left, softmax_scale)[0]


def aten_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward`."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert type(is_causal) is bool
    assert type(scale) is float
    assert cum_seq_q is not None
    window_size = (window_size_left, window_size_right)
    assert all(bound is None or bound >= 0 for bound in window_size)
    boundaries = (cum_seq_q, cum_seq_k, max_q, max_k)
    check_tensors(query, key, value)
    check_boundaries(query, key, *boundaries)
    check_grouped_queries(query, key, cum_seq_q, max_q)
    out, lse = attend_within(
        query, key, value, *boundaries[:2], bottom_right(is_causal, window_size), scale
    )
    return out, lse, torch.zeros(2), torch.empty(0), torch.empty(0)


def aten_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten::_flash_attention_backward`, which believes the out and lse that it is given."""
    assert dropout_p == 0.0
    assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
    assert unused.numel() == 0
    boundaries = (cum_seq_q, cum_seq_k, max_q, max_k)
    check_boundaries(query, key, *boundaries)
    visible = bottom_right(is_causal, (window_size_left, window_size_right))
    return go_back(grad_out, query, key, value, out, logsumexp, boundaries, visible, scale)


def varlen_with_flag(*packed: Any, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` in its first spelling."""
    return aten_forward(*packed, 0.0, is_causal, False, scale=scale)[0]


def varlen_with_window(
    *packed: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """In its second: causal is a window, and grouped heads need no word."""
    left, right = from_minus_one(window_size)
    return aten_forward(
        *packed, 0.0, False, False, scale=scale, window_size_left=left, window_size_right=right
    )[0]


def varlen_with_gqa(
    query: Tensor,
    key: Tensor,
    *packed: Any,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """In its third: grouped heads are refused unless they are asked for."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_with_window(query, key, *packed, scale=scale, window_size=window_size)
