"""What padless is compared with: the original's two attention layers, and the floor.

The original's are written from its contract: what each computes, in which layout, and what stands
between the projections and the kernel. The floor is what no implementation can leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.backends import sdpa, torch_varlen
from padless.layout import VarlenLayout

# q, k, v and the layout of a packed batch.
Kernel = Callable[[Tensor, Tensor, Tensor, VarlenLayout], Tensor]


def original_flash(
    attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, key_padding_mask: Tensor | None
) -> Tensor:
    """Attends as the original's FlashAttention path: stack, unpad, packed kernel, pad, each layer.

    Args:
        attention: a LlamaAttention, for its projections.
        hidden: `(batch, seqlen, hidden_size)`.
        cos: `(batch, seqlen, head_dim)`.
        sin: shape of cos.
        key_padding_mask: bool `(batch, seqlen)`, True = real; None if all are.

    Returns:
        `(batch, seqlen, hidden_size)`.

    Raises:
        RuntimeError: fewer KV heads than heads, which the original cannot stack.
    """
    batch, seqlen, _ = hidden.shape
    q, k, v = _projected(attention, hidden, cos, sin)
    # The original takes one tensor of q, k and v, tokens before heads.
    qkv = torch.stack([q, k, v], dim=2).transpose(1, 3)  # (b, s, 3, h, d)
    tokens = qkv.reshape(batch * seqlen, *qkv.shape[2:])
    if key_padding_mask is None:
        layout = VarlenLayout.from_rows(batch, seqlen, device=hidden.device)
        out = _fa2(hidden)(tokens[:, 0], tokens[:, 1], tokens[:, 2], layout)
    else:
        # Here the host waits for the device: lengths and indices, anew in each layer.
        layout = VarlenLayout.from_mask(key_padding_mask)
        indices = key_padding_mask.flatten().nonzero().squeeze(1)
        real = _Gather.apply(tokens, indices)
        packed = _fa2(hidden)(real[:, 0], real[:, 1], real[:, 2], layout)
        empty = packed.new_zeros(batch * seqlen, *packed.shape[1:])
        out = empty.index_copy(0, indices, packed)
    return attention.o_proj(out.reshape(batch, seqlen, -1))


def original_sdpa(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attends as the original's SDPA path in training: causal over all slots, the mask not read.

    Args:
        attention: a LlamaAttention, for its projections.
        hidden: `(batch, seqlen, hidden_size)`.
        cos: `(batch, seqlen, head_dim)`.
        sin: shape of cos.

    Returns:
        `(batch, seqlen, hidden_size)`.

    Raises:
        RuntimeError: fewer KV heads than heads, which the original does not repeat.
    """
    batch, seqlen, _ = hidden.shape
    q, k, v = _projected(attention, hidden, cos, sin)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.0)
    return attention.o_proj(out.transpose(1, 2).reshape(batch, seqlen, -1))


def floor(attention: Any, hidden: Tensor, layout: VarlenLayout, kernel: Kernel) -> Tensor:
    """Projects, attends and projects, with nothing in between: no rotary embedding, no checks.

    Args:
        attention: a LlamaAttention, for its weights.
        hidden: `(total, hidden_size)`, real tokens only.
        layout: of their sequences.
        kernel: attention within each.

    Returns:
        `(total, hidden_size)`.
    """
    heads = (hidden.shape[0], -1, attention.head_dim)
    q, k, v = (
        F.linear(hidden, projection.weight).view(heads)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = kernel(q, k, v, layout)
    return F.linear(out.reshape(hidden.shape[0], -1), attention.o_proj.weight)


def floor_one_product(
    weight: Tensor, attention: Any, hidden: Tensor, layout: VarlenLayout, kernel: Kernel
) -> Tensor:
    """Does what `floor` does with the weights of q, k and v in one matrix.

    Args:
        weight: `((num_heads + 2 num_kv_heads) head_dim, hidden_size)`.
        attention: a LlamaAttention, for its sizes and its output projection.
        hidden: `(total, hidden_size)`, real tokens only.
        layout: of their sequences.
        kernel: attention within each.
    """
    num_heads = attention.q_proj.out_features // attention.head_dim
    num_kv_heads = attention.k_proj.out_features // attention.head_dim
    qkv = F.linear(hidden, weight).view(hidden.shape[0], -1, attention.head_dim)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    out = kernel(q, k, v, layout)
    return F.linear(out.reshape(hidden.shape[0], -1), attention.o_proj.weight)


@functools.cache
def fastest_kernel(device: str) -> tuple[str, Kernel]:
    """Finds the kernel of the floor: FlashAttention-4 if it is there, else torch's own.

    Args:
        device: "cuda" or "cpu".

    Returns:
        What it is, and the kernel.
    """
    if device != "cuda":
        return "torch SDPA", _adapted(sdpa)
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func
    except Exception:
        # Missing or broken: either way it cannot be the floor.
        return "torch varlen_attn (FA2)", _adapted(torch_varlen)

    def fa4(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout) -> Tensor:
        result = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_k=layout.max_seqlen,
            causal=True,
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return "FlashAttention-4", fa4


def _fa2(hidden: Tensor) -> Kernel:
    """FlashAttention-2, of which torch holds a copy; on a CPU what stands in for it."""
    return _adapted(torch_varlen if hidden.is_cuda else sdpa)


def _adapted(backend: Any) -> Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout) -> Tensor:
        scale = q.shape[-1] ** -0.5
        out: Tensor = backend.varlen(q, k, v, layout, layout, causal=True, softmax_scale=scale)
        return out

    return kernel


def _projected(
    attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects and rotates: q, k, v of `(batch, heads, seqlen, head_dim)`."""
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    q = attention.q_proj(hidden).view(heads).transpose(1, 2)
    k = attention.k_proj(hidden).view(heads).transpose(1, 2)
    v = attention.v_proj(hidden).view(heads).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Gather(torch.autograd.Function):
    """Picks rows; its backward writes them back without adding up, as no row is picked twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.count = rows.shape[0]
        return rows.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        empty = grad.new_zeros(ctx.count, *grad.shape[1:])
        return empty.index_copy_(0, indices, grad), None
