"""Attention over keys in parts: the parts' outputs weighed by the logarithms of their sums."""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = float("-inf")


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Adds attention over further keys to what has been attended to so far.

    With m the larger lse of the two, and e = exp(lse - m) each:

        out = (out e + part e') / (e + e')        lse = m + log(e + e')

    Args:
        out: `(rows, num_heads, head_dim)`, any floating dtype.
        lse: `(num_heads, rows)`, float32 or float64, natural logarithms of the sums; -inf where no
            key has been seen.
        part: shape of out, any floating dtype; attention over the further keys.
        part_lse: shape of lse.

    Returns:
        out and lse of all keys, both in lse's dtype.

    Note:
        Rows that see none of the further keys stay as they are, whatever `part` has there; rows
        that have seen none at all stay zero, with an lse of -inf.
    """
    part_lse = part_lse.to(lse.dtype)
    # Without the larger one taken off, exp would overflow at scores of 89 in float32.
    top = torch.maximum(lse, part_lse)
    top = top.masked_fill(top == _NOTHING, 0.0)
    weight, part_weight = (lse - top).exp(), (part_lse - top).exp()
    total = weight + part_weight
    scale = total.masked_fill(total == 0.0, 1.0)
    # 0 times what is not finite would be NaN: kernels leave anything in rows without a key.
    part = part.masked_fill(_rows(part_lse == _NOTHING), 0.0)
    # Two passes over memory, which read half types as they are: it is what a merge waits for.
    merged = (out * _rows(weight / scale)).addcmul_(part, _rows(part_weight / scale))
    return merged, top + total.log()


def _rows(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(-1)  # (h, s) to (s, h, 1)
