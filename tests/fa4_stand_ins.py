"""Stand-ins for FlashAttention-4: signatures and refusals of its versions, the right numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accuracy import Window
from kernel_checks import attend_within, bottom_right, check_boundaries, check_tensors, go_back


def fa4_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """`flash_attn.cute` 4.0.0b36: no bound is None, and always a pair comes back."""
    assert (qv, min_seqlen_k, seqused_q, seqused_k, gather_kv_indices) == (None,) * 5
    assert (page_table, learnable_sink, score_mod, mask_mod) == (None,) * 4
    assert (softcap, num_splits, pack_gqa) == (0.0, 1, None)
    return _fa4(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_lse,
    )


def fa4_varlen_early(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """4.0.0b5: other positions, and no `return_lse`."""
    return _fa4(
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        False,
    )


def _fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[Any, ...],
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    deterministic: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    check_tensors(q, k, v)
    check_boundaries(q, k, *boundaries)
    assert type(softmax_scale) is float
    assert type(deterministic) is bool
    assert all(bound is None or bound >= 0 for bound in window_size)
    out, lse = attend_within(
        q, k, v, *boundaries[:2], bottom_right(causal, window_size), softmax_scale
    )
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return out, lse if requires_grad or return_lse else None


def fa4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_flash_attn_bwd` of 4.0.0b36, which believes the out and lse that it is given."""
    assert (softcap, m_block_size) == (0.0, 64)
    assert (seqused_q, seqused_k, dq, dk, dv, dlse) == (None,) * 6
    assert type(deterministic) is bool
    boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_tensors(q, k, v)
    check_boundaries(q, k, *boundaries)
    visible = bottom_right(causal, (window_size_left, window_size_right))
    return go_back(dout, q, k, v, out, lse, boundaries, visible, softmax_scale)
