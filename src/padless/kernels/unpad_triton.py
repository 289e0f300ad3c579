"""A padded batch made flat by two Triton kernels, before anything is known of it on the host.

Importing this module imports Triton: `padless.kernels.unpad` does so when a CUDA tensor comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from padless.kernels.launch import on_device
from padless.kernels.unpad import IGNORED, FlatTokens, Unpadded

# Slots that a program reads at a time, and rows whose lengths it adds up at a time.
_BLOCK, _ROWS = 1024, 128

_SIZES = (
    *("seqlen", "batch", "stride_mask_row", "stride_mask", "stride_ids_row", "stride_ids"),
    *("stride_labels_row", "stride_labels", "stride_shift_row", "stride_shift"),
)


# No number is compiled in: each batch has others.
@triton.jit(do_not_specialize=_SIZES)
def _count_kernel(
    mask_ptr,
    labels_ptr,
    shift_ptr,
    numbers_ptr,
    seqlen,
    batch,
    stride_mask_row,
    stride_mask,
    stride_labels_row,
    stride_labels,
    stride_shift_row,
    stride_shift,
    HAS_LABELS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the real tokens of a row, and its labels that are compared with padding."""
    # Offsets are int64: rows may lie far apart. `while`, and not `range`, whose bounds Triton's
    # interpreter does not take from arguments under newer NumPy.
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.int64)
    bound = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int64)
    while start < seqlen:
        cols = start + tl.arange(0, BLOCK)
        inside = cols < seqlen
        slot = mask_ptr + row * stride_mask_row + cols * stride_mask
        real = (tl.load(slot, mask=inside, other=0) != 0) & inside
        count += tl.sum(real.to(tl.int64), 0)
        if HAS_LABELS:
            # Each is compared with the output one slot earlier, the first with none.
            has_front = inside & (cols > 0)
            front = tl.load(slot - stride_mask, mask=has_front, other=0) != 0
            at = labels_ptr + row * stride_labels_row + cols * stride_labels
            counted = tl.load(at, mask=has_front, other=IGNORED) != IGNORED
            bound += tl.sum((counted & has_front & ~(real & front)).to(tl.int64), 0)
        if HAS_SHIFT:
            at = shift_ptr + row * stride_shift_row + cols * stride_shift
            counted = tl.load(at, mask=inside, other=IGNORED) != IGNORED
            bound += tl.sum((counted & inside & ~real).to(tl.int64), 0)
        start += BLOCK
    tl.store(numbers_ptr + row, count)
    tl.store(numbers_ptr + batch + row, bound)


@triton.jit(do_not_specialize=_SIZES)
def _compact_kernel(
    mask_ptr,
    ids_ptr,
    labels_ptr,
    shift_ptr,
    numbers_ptr,
    cu_seqlens_ptr,
    indices_ptr,
    positions_ptr,
    out_ids_ptr,
    out_labels_ptr,
    out_shift_ptr,
    seqlen,
    batch,
    stride_mask_row,
    stride_mask,
    stride_ids_row,
    stride_ids,
    stride_labels_row,
    stride_labels,
    stride_shift_row,
    stride_shift,
    HAS_IDS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes the real tokens of a row behind those of the rows in front of it."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int64)
    while first < row:
        rows = first + tl.arange(0, ROWS)
        total += tl.sum(tl.load(numbers_ptr + rows, mask=rows < row, other=0), 0)
        first += ROWS
    if row == 0:
        tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + row + 1, (total + tl.load(numbers_ptr + row)).to(tl.int32))
    start = tl.zeros((), tl.int64)
    while start < seqlen:
        cols = start + tl.arange(0, BLOCK)
        inside = cols < seqlen
        slot = mask_ptr + row * stride_mask_row + cols * stride_mask
        real = (tl.load(slot, mask=inside, other=0) != 0) & inside
        place = total + tl.cumsum(real.to(tl.int64), 0) - 1
        total += tl.sum(real.to(tl.int64), 0)
        tl.store(indices_ptr + place, row * seqlen + cols, mask=real)
        tl.store(positions_ptr + place, cols, mask=real)
        if HAS_IDS:
            ids = tl.load(ids_ptr + row * stride_ids_row + cols * stride_ids, mask=real)
            tl.store(out_ids_ptr + place, ids, mask=real)
        if HAS_LABELS:
            has_front = real & (cols > 0)
            follows = tl.load(slot - stride_mask, mask=has_front, other=0) != 0
            at = labels_ptr + row * stride_labels_row + cols * stride_labels
            labels = tl.load(at, mask=has_front & follows, other=IGNORED)
            tl.store(out_labels_ptr + place, labels, mask=real)
        if HAS_SHIFT:
            at = shift_ptr + row * stride_shift_row + cols * stride_shift
            tl.store(out_shift_ptr + place, tl.load(at, mask=real), mask=real)
        start += BLOCK


def unpad(
    key_padding_mask: Tensor,
    input_ids: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
) -> Unpadded:
    """Makes a batch flat; launches two kernels and waits for nothing.

    Args:
        key_padding_mask: bool or integer `(batch, seqlen)`, nonzero = real, any strides.
        input_ids: integer `(batch, seqlen)`, any strides; None if there are none.
        labels: likewise.
        shift_labels: likewise.
    """
    batch, seqlen = key_padding_mask.shape
    device = key_padding_mask.device
    mask = key_padding_mask
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    numbers = torch.empty(2 * batch, dtype=torch.int64, device=device)
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=device)
    indices, positions = torch.empty(2, batch * seqlen, dtype=torch.int64, device=device)
    given = (input_ids, labels, shift_labels)
    outs = [x if x is None else x.new_empty(batch * seqlen) for x in given]
    # What is missing is not compiled in, but its arguments have to be something.
    ids, labels, shift_labels = (mask if x is None else x for x in given)
    out_ids, out_labels, out_shift = (indices if x is None else x for x in outs)
    has = {name: x is not None for name, x in zip(("IDS", "LABELS", "SHIFT"), given, strict=True)}
    # Triton launches on the current device, which need not be the mask's.
    with on_device(mask.device):
        _count_kernel[(batch,)](
            mask,
            labels,
            shift_labels,
            numbers,
            seqlen,
            batch,
            *mask.stride(),
            *labels.stride(),
            *shift_labels.stride(),
            HAS_LABELS=has["LABELS"],
            HAS_SHIFT=has["SHIFT"],
            IGNORED=IGNORED,
            BLOCK=_BLOCK,
        )
        _compact_kernel[(batch,)](
            mask,
            ids,
            labels,
            shift_labels,
            numbers,
            cu_seqlens,
            indices,
            positions,
            out_ids,
            out_labels,
            out_shift,
            seqlen,
            batch,
            *mask.stride(),
            *ids.stride(),
            *labels.stride(),
            *shift_labels.stride(),
            HAS_IDS=has["IDS"],
            HAS_LABELS=has["LABELS"],
            HAS_SHIFT=has["SHIFT"],
            IGNORED=IGNORED,
            BLOCK=_BLOCK,
            ROWS=_ROWS,
        )
    return Unpadded(numbers, cu_seqlens, indices, FlatTokens(positions, *outs))
