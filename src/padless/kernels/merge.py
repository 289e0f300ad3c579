"""`merge_rows`: attention over further keys, added in place to what has been attended to so far.

Owns the choice of what does it. The kernel is in `merge_triton`, its twin in `merge_torch`: some
twenty kernels of torch, which pass over memory several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padless.environment import is_compiling, is_tracing
from padless.kernels.launch import are_plain, is_gpu
from padless.kernels.merge_torch import merge
from padless.kernels.trial import faults_by

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_rows(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor
) -> None:
    """Adds attention over further keys to some rows, in place, by one kernel where it serves.

    Args:
        out: `(total, num_heads, head_dim)`, any floating dtype; results are rounded to it once.
        lse: `(num_heads, total or more)`, float32 or float64, natural logarithms of the sums; -inf
            where no key has been seen.
        part: `(rows, num_heads, head_dim)`, any floating dtype; attention over the further keys.
        part_lse: `(num_heads, rows)`, dtype of lse.
        rows: which of out they are: a slice with both ends, or int64 `(rows,)`, no two alike.

    Note:
        Rows that see none of the further keys stay as they are, whatever `part` has there. No
        gradient goes through it.
    """
    index = rows if isinstance(rows, Tensor) else None
    start = 0 if isinstance(rows, Tensor) else int(rows.start)
    if _serves(out, lse, part, part_lse, index):
        from padless.kernels import merge_triton  # imports Triton

        merge_triton.merge_rows(out, lse, part, part_lse, start, index)
    elif index is None:
        some, sums = out.narrow(0, start, len(part)), lse.narrow(1, start, len(part))
        merged, total = merge(some, sums, part, part_lse)
        some.copy_(merged)
        sums.copy_(total)
    else:
        some, sums = out.index_select(0, index), lse.index_select(1, index)
        merged, total = merge(some, sums, part, part_lse)
        out.index_copy_(0, index, merged.to(out.dtype))
        lse.index_copy_(1, index, total)


def _serves(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, index: Tensor | None) -> bool:
    if not is_gpu(out.device) or is_compiling() or is_tracing() or torch.is_grad_enabled():
        return False
    given = (out, lse, part, part_lse) if index is None else (out, lse, part, part_lse, index)
    if not are_plain(given, out.device):
        return False
    # Logarithms in float64 come with float64 outputs, of which the kernel would lose half.
    fits = out.dtype in _DTYPES and part.dtype in _DTYPES
    fits = fits and lse.dtype == part_lse.dtype == torch.float32
    fits = fits and part.shape[1:] == out.shape[1:] and lse.shape[0] == out.shape[1]
    fits = fits and part_lse.shape == (out.shape[1], part.shape[0])
    return fits and _fault(out.device) is None


def _try(device: torch.device) -> None:
    """Merges a few numbers by the kernel; raises if they are wrong."""
    from padless.kernels import merge_triton

    numbers = torch.linspace(-2, 2, 402, device=device)
    for dtype, rows in (
        (torch.bfloat16, slice(1, 4)),
        (torch.float16, torch.tensor([0, 3, 4], device=device)),
        (torch.float32, slice(1, 4)),
    ):
        out = numbers[:240].view(5, 2, 24).to(dtype, copy=True)
        part = numbers[240:384].view(3, 2, 24).to(dtype, copy=True)
        lse, part_lse = numbers[384:396].view(2, 6) * 9, numbers[396:].view(2, 3) * 5
        # A row that sees none of the further keys, with anything in it.
        part[1], part_lse[:, 1] = float("nan"), float("-inf")
        want, want_lse = out.clone(), lse.clone()
        new, sums = merge(out[rows], lse[:, rows], part, part_lse)
        want[rows], want_lse[:, rows] = new.to(dtype), sums
        start, index = (1, None) if isinstance(rows, slice) else (0, rows)
        merge_triton.merge_rows(out, lse, part, part_lse, start, index)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)


_fault = faults_by(_try)
