"""torch's scaled dot product attention: runs anywhere, one call for each pair of lengths.

Heads-first layouts stay inside this file and `hf`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.backends.dense_batches import by_lengths, dense_batches
from padless.backends.dense_lse import gradients as gradients
from padless.backends.dense_lse import reject_lse as reject_lse
from padless.backends.dense_lse import repeats_gradients
from padless.backends.dense_lse import varlen_with_lse as varlen_with_lse
from padless.backends.limits import in_reach
from padless.backends.request import AttentionRequest, Window
from padless.backends.rows import CachedRows
from padless.environment import has_sdpa, has_sdpa_gqa
from padless.layout import VarlenLayout
from padless.reference import visible_keys

NAME = "sdpa"


def version() -> str:
    """Returns the version of what computes: torch's."""
    return str(torch.__version__)


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
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> Tensor:
    """Attends within each sequence; see `padless.varlen_attention` for the arguments."""
    left, right = window_size
    window = (left, 0 if causal else right)
    members = by_lengths(layout_q, layout_k)
    with _kernels(q, deterministic):
        if len(members) == 1:
            ((seqlen_q, seqlen_k), same) = next(iter(members.items()))
            if len(same) == len(layout_q.lengths):
                # Equal lengths throughout: the packed tensors are a dense batch already.
                n = len(same)
                dense = _one_length(
                    q.reshape(n, seqlen_q, *q.shape[1:]),
                    k.reshape(n, seqlen_k, *k.shape[1:]),
                    v.reshape(n, seqlen_k, *v.shape[1:]),
                    window=window,
                    softmax_scale=softmax_scale,
                )
                return dense.reshape(q.shape)
        if _fills_up(q) and window == (None, 0) and layout_q.lengths == layout_k.lengths:
            return _filled_up(q, k, v, layout_q, softmax_scale)
        split = layout_q.split(q), layout_k.split(k), layout_k.split(v)
        out: list[Tensor] = [q[:0]] * len(layout_q.lengths)
        for same in members.values():
            dense = _one_length(
                *(_together(pieces, same) for pieces in split),
                window=window,
                softmax_scale=softmax_scale,
            )
            for index, piece in zip(same, dense.unbind(0), strict=True):
                out[index] = piece
    return torch.cat(out) if members else torch.zeros_like(q)


def _fills_up(q: Tensor) -> bool:
    """Whether calls cost more than work on what sequences are filled up with."""
    return q.is_cuda


def _filled_up(
    q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, softmax_scale: float
) -> Tensor:
    """Attends causally in few dense batches, each of sequences filled up to its longest.

    What a sequence is filled up with stands behind its own tokens, which therefore do not see it.
    """
    plan = dense_batches(layout, 7 * q.shape[1] * q.shape[2])
    parts = []
    for gathered, shape in plan.batches:
        dense = (x.index_select(0, gathered).view(*shape, *x.shape[1:]) for x in (q, k, v))
        out = _one_length(*dense, window=(None, 0), softmax_scale=softmax_scale)
        parts.append(out.reshape(-1, *q.shape[1:]))
    return torch.cat(parts).index_select(0, plan.places)


def _together(pieces: tuple[Tensor, ...], indices: list[int]) -> Tensor:
    """Joins pieces of one length to a dense batch `(n, s, h, d)`; one alone stays a view."""
    if len(indices) == 1:
        return pieces[indices[0]].unsqueeze(0)
    return torch.stack([pieces[index] for index in indices])


def _one_length(q: Tensor, k: Tensor, v: Tensor, *, window: Window, softmax_scale: float) -> Tensor:
    """Attends in a dense batch of sequences `(n, s, h, d)` that all have one length."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = window
    if seqlen_k == 0:
        # Zeros that are still a function of q for autograd.
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    # Bounds that no query comes near are none: they would cost the kernels that take no mask.
    left = None if left is not None and left >= seqlen_k - 1 else left
    right = None if right is not None and right >= seqlen_q - 1 else right
    no_key = 0 if right is None else seqlen_q - seqlen_k - right
    if no_key > 0:
        # The first rows see no key, and kernels disagree on what such a row gives (some NaN, also
        # in gradients): it is zero here. What is left is aligned as before.
        rest = _one_length(q[:, no_key:], k, v, window=(left, right), softmax_scale=softmax_scale)
        return F.pad(rest, (0, 0, 0, 0, no_key, 0))
    # SDPA's is_causal is aligned top-left: right only where both lengths are the same.
    is_causal = (left, right) == (None, 0) and seqlen_q == seqlen_k
    mask = None
    if not is_causal and (left, right) != (None, None):
        mask = visible_keys(
            seqlen_q, seqlen_k, causal=False, window_size=(left, right), device=q.device
        )
    return _dense(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask=mask,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
    ).transpose(1, 2)


def reject_decode(request: AttentionRequest) -> str | None:
    """Says why SDPA cannot decode; None if it can."""
    return reject(request)


def decode(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, rows: CachedRows, *, softmax_scale: float
) -> Tensor:
    """Attends from one query a row to the row's own keys.

    Args:
        q: `(batch, num_heads, head_dim)`.
        k_buffer: `(batch, capacity, num_kv_heads, head_dim)`.
        v_buffer: like k_buffer; what is in slots without a key has to be finite on CUDA.
        rows: how many keys each row has; with a mask on CUDA.
        softmax_scale: factor of the scores.

    Returns:
        `(batch, num_heads, head_dim)`.
    """
    query = q.unsqueeze(2)  # (b, h, 1, d)
    k, v = k_buffer.transpose(1, 2), v_buffer.transpose(1, 2)  # (b, hkv, capacity, d)
    if rows.key_padding_mask is not None:
        mask = rows.key_padding_mask[:, None, None, :]
        return dense_attention(query, k, v, mask=mask, softmax_scale=softmax_scale).squeeze(2)
    # On the CPU nothing waits for the lengths, calls are cheap and work is not.
    lengths = rows.lengths.tolist()
    out = []
    for first, last in _runs(lengths):
        keys = slice(lengths[first])
        part = slice(first, last)
        out.append(
            dense_attention(
                query[part], k[part, :, keys], v[part, :, keys], softmax_scale=softmax_scale
            )
        )
    return torch.cat(out).squeeze(2)


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Finds the stretches of neighbours with the same length."""
    ends = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    return list(zip([0, *ends], [*ends, len(lengths)], strict=True))


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
    with _kernels(q):
        return _dense(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
        )


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    if q.is_cuda and q.shape[-1] * q.element_size() % 16 == 0:
        # Kernels load 16 bytes at a time, and SDPA does not ask whether a view begins at such a
        # place: the error would end the use of CUDA in this process (torch 2.11 on an H200).
        q, k, v = (in_reach(x) for x in (q, k, v))
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


def _kernels(q: Tensor, deterministic: bool = False) -> AbstractContextManager[None]:
    """Keeps SDPA off cuDNN, which plans for tens of milliseconds at each length it has not met.

    Where gradients have to repeat and torch was not told so for the whole process, only the math
    kernel is left: the fused kernels on CUDA add up dq in any order.
    """
    if not q.is_cuda:
        return nullcontext()
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        # torch before 2.3: SDPA has no cuDNN kernel there.
        if not deterministic:
            return nullcontext()
        return torch.backends.cuda.sdp_kernel(
            enable_flash=False, enable_mem_efficient=False, enable_math=True
        )
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    by_formula = deterministic and not repeats_gradients()
    return sdpa_kernel([SDPBackend.MATH] if by_formula else [*fused, SDPBackend.MATH])
