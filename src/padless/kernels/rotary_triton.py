"""The rotary embedding of q and k in one Triton kernel; rotates back as well, which is its adjoint.

Importing this module imports Triton: `padless.kernels.rotary` does so when a CUDA tensor comes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from padless.kernels.launch import on_device

_STRIDES = (
    *("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_oqt", "stride_oqh"),
    *("stride_okt", "stride_okh", "stride_cos", "stride_sin"),
)


# Strides come in units of ALIGN numbers, and nothing else of them is compiled in: vector loads need
# that much, and the rest follows the number of tokens where heads come first in memory.
@triton.jit(do_not_specialize=_STRIDES)
def _rotary_kernel(
    q_ptr,
    k_ptr,
    out_q_ptr,
    out_k_ptr,
    cos_ptr,
    sin_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_oqt,
    stride_oqh,
    stride_okt,
    stride_okh,
    stride_cos,
    stride_sin,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rotates a block of heads of one token, in q and in k.

        out1 = x1 * cos1 - x2 * sin1        transposed:  out1 = x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 + x1 * sin2                     out2 = x2 * cos2 - x1 * sin1

    Grid: (total, blocks of heads). The number of tokens is no argument, so that no number of them
    compiles anything. Everything is read before anything is written, each number by the thread that
    writes it and its partner: out may be q and k themselves.
    """
    # Offsets are int64: a packed batch may hold more than 2^31 numbers.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = tl.arange(0, BLOCK_HALF)
    has_col = cols < HALF
    cos = cos_ptr + token * stride_cos * ALIGN + cols
    sin = sin_ptr + token * stride_sin * ALIGN + cols
    cos1 = tl.load(cos, mask=has_col, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + HALF, mask=has_col, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin, mask=has_col, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + HALF, mask=has_col, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        from2, from1 = sin2, -sin1
    else:
        from2, from1 = -sin1, sin2
    # A side without heads (one gradient of the two) is not compiled in.
    if NUM_HEADS:
        heads = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        in_q = (heads < NUM_HEADS) & has_col[None, :]
        q = q_ptr + (token * stride_qt + heads * stride_qh) * ALIGN + cols[None, :]
        q1 = tl.load(q, mask=in_q, other=0.0).to(tl.float32)
        q2 = tl.load(q + HALF, mask=in_q, other=0.0).to(tl.float32)
    if NUM_KV_HEADS:
        kv_heads = (block * BLOCK_KV_HEADS + tl.arange(0, BLOCK_KV_HEADS)).to(tl.int64)[:, None]
        in_k = (kv_heads < NUM_KV_HEADS) & has_col[None, :]
        k = k_ptr + (token * stride_kt + kv_heads * stride_kh) * ALIGN + cols[None, :]
        k1 = tl.load(k, mask=in_k, other=0.0).to(tl.float32)
        k2 = tl.load(k + HALF, mask=in_k, other=0.0).to(tl.float32)
    if NUM_HEADS:
        out_q = out_q_ptr + (token * stride_oqt + heads * stride_oqh) * ALIGN + cols[None, :]
        tl.store(out_q, q1 * cos1 + q2 * from2, mask=in_q)
        tl.store(out_q + HALF, q2 * cos2 + q1 * from1, mask=in_q)
    if NUM_KV_HEADS:
        out_k = out_k_ptr + (token * stride_okt + kv_heads * stride_okh) * ALIGN + cols[None, :]
        tl.store(out_k, k1 * cos1 + k2 * from2, mask=in_k)
        tl.store(out_k + HALF, k2 * cos2 + k1 * from1, mask=in_k)


class _Tiles(NamedTuple):
    blocks: int
    block_heads: int
    block_kv_heads: int
    block_half: int
    num_warps: int


@functools.cache
def _tiles(num_heads: int, num_kv_heads: int, half: int) -> _Tiles:
    """Divides the heads of a token among programs, and a program's numbers among its threads.

    A program reads cos and sin once for its heads, at best all of them. 2048 numbers of a half are
    what 4 warps hold at 16 a thread, two vector loads of half precision: enough bytes in flight,
    and few enough registers for several programs on one processor.
    """
    block_half = triton.next_power_of_2(half)
    blocks = triton.cdiv(max(num_heads, num_kv_heads) * block_half, 2048)
    block_heads, block_kv_heads = (
        triton.next_power_of_2(max(1, triton.cdiv(heads, blocks)))
        for heads in (num_heads, num_kv_heads)
    )
    numbers = max(block_heads, block_kv_heads) * block_half
    return _Tiles(blocks, block_heads, block_kv_heads, block_half, max(1, min(8, numbers // 512)))


def _strides(
    q: Tensor, k: Tensor, out_q: Tensor, out_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[int, list[int]]:
    """Gives ALIGN, and the kernel's strides in units of it."""
    strides = [size for x in (q, k, out_q, out_k) for size in x.stride()[:2]]
    strides += [cos.stride(0), sin.stride(0)]
    # 16 numbers are two of the widest vectors in half precision: more would be of no use.
    align = math.gcd(16, *strides)
    return align, [size // align for size in strides]


def rotate(
    q: Tensor | None,
    k: Tensor | None,
    out_q: Tensor | None,
    out_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    transposed: bool,
) -> None:
    """Rotates q into out_q and k into out_k, which may be q and k; launches one kernel.

    Args:
        q: `(total, num_heads, head_dim)` with a contiguous last dimension; None with out_q.
        k: `(total, num_kv_heads, head_dim)`, likewise.
        out_q: shape of q, any strides but for a contiguous last dimension.
        out_k: shape of k, likewise.
        cos: `(total, head_dim)` with a contiguous last dimension.
        sin: likewise.
        transposed: whether to rotate back.
    """
    total, head_dim = cos.shape
    num_heads = 0 if q is None else q.shape[1]
    num_kv_heads = 0 if k is None else k.shape[1]
    if total * max(num_heads, num_kv_heads) == 0:
        return
    # A missing side is not compiled in, but its arguments have to be something.
    q, out_q = (k, out_k) if q is None else (q, out_q)
    k, out_k = (q, out_q) if k is None else (k, out_k)
    assert q is not None and k is not None and out_q is not None and out_k is not None
    align, strides = _strides(q, k, out_q, out_k, cos, sin)
    tiles = _tiles(num_heads, num_kv_heads, head_dim // 2)
    # Triton launches on the current device, which need not be q's.
    with on_device(q.device):
        _rotary_kernel[(total, tiles.blocks)](
            q,
            k,
            out_q,
            out_k,
            cos,
            sin,
            *strides,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            BLOCK_HEADS=tiles.block_heads,
            BLOCK_KV_HEADS=tiles.block_kv_heads,
            BLOCK_HALF=tiles.block_half,
            ALIGN=align,
            TRANSPOSED=transposed,
            num_warps=tiles.num_warps,
        )
