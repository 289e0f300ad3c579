"""Few dense batches for sequences of many lengths: what is computed besides costs less than calls.

On a GPU a call of a dense kernel costs the host a tenth of a millisecond and more, in each layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from padless.layout import VarlenLayout

# Work that is worth a call: what a large GPU does in float32 while the host makes one, forward and
# backward.
CALL_FLOPS = 2**31


@dataclass(frozen=True)
class DenseBatches:
    """Dense batches that hold all sequences of a layout, each filled up by its own last token.

    Attributes:
        batches: for each, int64 `(n * seqlen,)`, the packed token of each of its slots, and its
            shape `(n, seqlen)`.
        places: int64 `(total,)`, where each packed token is in all batches one after the other.
    """

    batches: tuple[tuple[Tensor, tuple[int, int]], ...]
    places: Tensor


def by_lengths(layout_q: VarlenLayout, layout_k: VarlenLayout) -> dict[tuple[int, int], list[int]]:
    """Groups the sequences that have queries: their numbers by their lengths in q and in k."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(zip(layout_q.lengths, layout_k.lengths, strict=True)):
        if pair[0]:
            members.setdefault(pair, []).append(index)
    return members


# The layers of a forward share a layout.
_known: weakref.WeakKeyDictionary[VarlenLayout, dict[int, DenseBatches]] = (
    weakref.WeakKeyDictionary()
)


def dense_batches(layout: VarlenLayout, flops_a_pair: int) -> DenseBatches:
    """Makes the dense batches of a layout, without waiting for the device; remembers them.

    Args:
        layout: of the packed tokens.
        flops_a_pair: work for a query and a key before it, forward and backward.
    """
    made = _known.setdefault(layout, {})
    if flops_a_pair not in made:
        made[flops_a_pair] = _make(layout, flops_a_pair)
    return made[flops_a_pair]


def group_lengths(lengths: Sequence[int], flops_a_pair: int) -> list[list[int]]:
    """Divides sequences into groups to be filled up to the longest of each.

    Args:
        lengths: of the sequences; empty ones are in no group.
        flops_a_pair: work for a query and a key before it.

    Returns:
        Their indices, by falling length. A sequence joins the group of longer ones if filling it up
        costs less than a call.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] == 0:
            break
        longest = lengths[groups[-1][0]] if groups else 0
        extra = (longest**2 - lengths[index] ** 2) // 2 * flops_a_pair
        if groups and extra <= CALL_FLOPS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _make(layout: VarlenLayout, flops_a_pair: int) -> DenseBatches:
    device = layout.cu_seqlens.device
    lengths = torch.tensor(layout.lengths)
    ends = lengths.cumsum(0)
    places = torch.empty(layout.total, dtype=torch.int64)
    batches = []
    begin = 0
    for group in group_lengths(layout.lengths, flops_a_pair):
        members = torch.tensor(group)
        first, length = (ends - lengths)[members, None], lengths[members, None]
        columns = torch.arange(layout.lengths[group[0]])
        gathered = first + torch.minimum(columns, length - 1)  # (n, s)
        real = columns < length
        places[gathered[real]] = begin + real.flatten().nonzero().squeeze(1)
        begin += gathered.numel()
        shape = (gathered.shape[0], gathered.shape[1])
        batches.append((gathered.flatten().to(device, non_blocking=True), shape))
    return DenseBatches(tuple(batches), places.to(device, non_blocking=True))
