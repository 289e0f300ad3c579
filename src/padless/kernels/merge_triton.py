"""Attention over further keys added to what has been attended to so far, in one Triton kernel.

Importing this module imports Triton: `padless.kernels.merge` does so when a CUDA tensor comes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padless.kernels.launch import on_device

# Numbers of a program: 4 warps at 32 a thread, four vector loads of half precision from each side,
# which are under way together. 32 rows of one head of 128, and 32 neighbouring logarithms.
_NUMBERS = 4096


# No number of rows is compiled in: each batch has others.
@triton.jit(do_not_specialize=("rows", "start", "stride_lse"))
def _merge_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    index_ptr,
    rows,
    start,
    stride_lse,
    HAS_INDEX: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges some rows of one head, with e = exp(lse - max(lse, lse')) of each.

        out = (out e + out' e') / (e + e')        lse = max(lse, lse') + log(e + e')

    Grid: (blocks of rows * NUM_HEADS,), the heads of a block beside each other: they are neighbours
    in memory. Each number is read once and written once.
    """
    program = tl.program_id(0)
    # Offsets are int64: a row of long sequences may have more than 2^31 numbers.
    head = (program % NUM_HEADS).to(tl.int64)
    place = (program // NUM_HEADS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < rows
    if HAS_INDEX:
        row = tl.load(index_ptr + place, mask=inside, other=0)
    else:
        row = start + place
    nothing = float("-inf")
    lse_at = lse_ptr + head * stride_lse + row
    lse = tl.load(lse_at, mask=inside, other=nothing)
    part_lse = tl.load(part_lse_ptr + head * rows + place, mask=inside, other=nothing)
    # Without the larger one taken off, exp would overflow at 89.
    top = tl.maximum(lse, part_lse)
    top = tl.where(top == nothing, 0.0, top)
    weight = tl.exp(lse - top)
    part_weight = tl.exp(part_lse - top)
    total = weight + part_weight
    scale = tl.where(total == 0.0, 1.0, total)
    cols = tl.arange(0, BLOCK)
    within = inside[:, None] & (cols < HEAD_DIM)[None, :]
    out_at = out_ptr + ((row * NUM_HEADS + head) * HEAD_DIM)[:, None] + cols[None, :]
    part_at = part_ptr + ((place * NUM_HEADS + head) * HEAD_DIM)[:, None] + cols[None, :]
    out = tl.load(out_at, mask=within, other=0.0).to(tl.float32)
    part = tl.load(part_at, mask=within, other=0.0).to(tl.float32)
    # 0 times what is not finite would be NaN: kernels leave anything in rows without a key.
    part = tl.where((part_lse == nothing)[:, None], 0.0, part)
    merged = out * (weight / scale)[:, None] + part * (part_weight / scale)[:, None]
    tl.store(out_at, merged, mask=within)
    tl.store(lse_at, tl.where(total == 0.0, nothing, top + tl.log(scale)), mask=inside)


def merge_rows(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, start: int, index: Tensor | None
) -> None:
    """Merges in place; launches one kernel.

    Args:
        out: `(total, num_heads, head_dim)`, float32, float16 or bfloat16, contiguous as all are.
        lse: `(num_heads, total or more)`, float32.
        part: `(rows, num_heads, head_dim)`, float32, float16 or bfloat16.
        part_lse: `(num_heads, rows)`, float32.
        start: the first row of out, whose neighbours are the others; 0 with an index.
        index: int64 `(rows,)`, rows of out, no two alike; None for a stretch.
    """
    rows, num_heads, head_dim = part.shape
    if part.numel() == 0:
        return
    block = triton.next_power_of_2(head_dim)
    at_a_time = max(1, _NUMBERS // block)
    # Triton launches on the current device, which need not be the tensors'.
    with on_device(out.device):
        _merge_kernel[(triton.cdiv(rows, at_a_time) * num_heads,)](
            out,
            lse,
            part,
            part_lse,
            # Read only where it is one.
            part_lse if index is None else index,
            rows,
            start,
            lse.shape[1],
            HAS_INDEX=index is not None,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            ROWS=at_a_time,
            BLOCK=block,
            num_warps=4,
        )
