"""The rotary embedding of a decoding step and its place in the cache, in one Triton kernel.

Importing this module imports Triton: `padless.kernels.rotary_keep` does so for a CUDA tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padless.kernels.launch import on_device


@triton.jit
def _rotate_and_keep_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_slots_ptr,
    v_slots_ptr,
    slots_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotates one head of q, or rotates one of k and keeps it beside the same one of v.

        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2

    Grid: (rows, NUM_HEADS + NUM_KV_HEADS). No number of rows or slots is compiled in. A step has
    few numbers and waits for memory once: many small programs wait at the same time. Each number of
    q is written by the thread that has read it and its partner.
    """
    # Offsets are int64: a cache may hold more than 2^31 numbers.
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    within = cols < HALF
    table = row * (2 * HALF) + cols
    cos1 = tl.load(cos_ptr + table, mask=within, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + table + HALF, mask=within, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + table, mask=within, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + table + HALF, mask=within, other=0.0).to(tl.float32)
    if head < NUM_HEADS:
        q = q_ptr + (row * NUM_HEADS + head) * (2 * HALF) + cols
        q1 = tl.load(q, mask=within, other=0.0).to(tl.float32)
        q2 = tl.load(q + HALF, mask=within, other=0.0).to(tl.float32)
        tl.store(q, q1 * cos1 - q2 * sin1, mask=within)
        tl.store(q + HALF, q2 * cos2 + q1 * sin2, mask=within)
    else:
        kv_head = head - NUM_HEADS
        place = (row * NUM_KV_HEADS + kv_head) * (2 * HALF) + cols
        k1 = tl.load(k_ptr + place, mask=within, other=0.0).to(tl.float32)
        k2 = tl.load(k_ptr + place + HALF, mask=within, other=0.0).to(tl.float32)
        v1 = tl.load(v_ptr + place, mask=within, other=0.0)
        v2 = tl.load(v_ptr + place + HALF, mask=within, other=0.0)
        slot = tl.load(slots_ptr + row)
        kept = (slot * NUM_KV_HEADS + kv_head) * (2 * HALF) + cols
        tl.store(k_slots_ptr + kept, k1 * cos1 - k2 * sin1, mask=within)
        tl.store(k_slots_ptr + kept + HALF, k2 * cos2 + k1 * sin2, mask=within)
        tl.store(v_slots_ptr + kept, v1, mask=within)
        tl.store(v_slots_ptr + kept + HALF, v2, mask=within)


def rotate_and_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    slots: Tensor,
) -> None:
    """Rotates q in place and keeps k, rotated, and v in slots; launches one kernel.

    Args:
        q: `(rows, num_heads, head_dim)`, contiguous as all others are.
        k: `(rows, num_kv_heads, head_dim)`.
        v: like k.
        cos: `(1, rows, head_dim)`.
        sin: like cos.
        k_slots: `(slots, num_kv_heads, head_dim)`.
        v_slots: like k_slots.
        slots: int64 `(rows,)`.
    """
    rows, num_heads, head_dim = q.shape
    if rows == 0:
        return
    half = head_dim // 2
    # Triton launches on the current device, which need not be q's.
    with on_device(q.device):
        _rotate_and_keep_kernel[(rows, num_heads + k.shape[1])](
            q,
            k,
            v,
            cos,
            sin,
            k_slots,
            v_slots,
            slots,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=k.shape[1],
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
