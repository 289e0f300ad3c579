"""Reads where a batch's real tokens and documents are, with one transfer to the host.

What the layout consists of is made on the device before anything is known of it, so that nothing
but a few numbers has to cross, and the device waits for no host in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.kernels.unpad import IGNORED, FlatTokens, Unpadded, unpad_rows
from padless.layout import VarlenLayout

_BOUND = "a label that is compared with an output at padding"
_EMPTY = "a batch without a real token"


@dataclass(frozen=True)
class Structure:
    """What a batch turned out to be.

    Attributes:
        layout: its real tokens and their sequences; None if it has to be left to the stock path.
        reason: why, then.
        host_syncs: host synchronisations spent, 0 or 1.
        tokens: the batch made flat on the way, where kernels did.
    """

    layout: VarlenLayout | None
    reason: str = ""
    host_syncs: int = 0
    tokens: FlatTokens | None = None


def read_structure(
    batch: int,
    seqlen: int,
    device: torch.device,
    *,
    key_padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    layout: VarlenLayout | None = None,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
) -> Structure:
    """Reads a batch of `(batch, seqlen)` slots.

    Args:
        batch: rows.
        seqlen: slots of each row.
        device: where the result is needed.
        key_padding_mask: `(batch, seqlen)`, nonzero = real; None if all are.
        position_ids: int `(batch or 1, seqlen)`; a 0 behind another token begins a document.
        cu_seqlens: int `(documents + 1,)` over all slots, row after row; goes before position_ids.
        cu_seqlens_k: what the caller says of keys; without a cache it is the same.
        layout: the answer itself, made beforehand; goes before both.
        input_ids: `(batch, seqlen)`, only to be made flat on the way.
        labels: `(batch, seqlen)`, each compared with the output one slot earlier.
        shift_labels: `(batch, seqlen)`, each compared with the output of its own slot.

    Returns:
        The layout, or the reason why the batch has to be left to the stock path.

    Raises:
        ValueError: cu_seqlens do not cover the slots row by row, or a layout is not of this batch.
    """
    if layout is not None:
        layout = _of_shape(layout, batch, seqlen).to(device)
    nothing = key_padding_mask is None and cu_seqlens is None
    if layout is None and nothing and position_ids is None:
        return Structure(VarlenLayout.from_rows(batch, seqlen, device=device))
    if layout is not None and nothing and layout.indices is None:
        return Structure(layout)
    if key_padding_mask is not None and all(x is None for x in (position_ids, cu_seqlens, layout)):
        flat = unpad_rows(key_padding_mask, input_ids, labels, shift_labels)
        if flat is not None and flat.numbers.device == device:
            return _of_flat(flat, batch, seqlen)
    real = _real(batch, seqlen, device, key_padding_mask, layout)
    facts = [
        _bound(real, labels, shift_labels).any(),
        _agree(real, key_padding_mask, layout),
        _covers(real, cu_seqlens, cu_seqlens_k),
    ]
    starts = None
    if layout is None and cu_seqlens is not None:
        starts = _edges(cu_seqlens.to(device), batch, seqlen)
        facts += [starts[:, 0].all(), facts[0].new_zeros(()), facts[0].new_zeros(())]
    elif layout is None and position_ids is not None:
        positions = position_ids.to(device).expand(batch, seqlen)
        zero = positions == 0
        starts = zero & real
        facts += [facts[0].new_ones(()), *_irregular(positions, zero, real)]
    made = _made(real, key_padding_mask)
    numbers, codes = _fetch(real, starts, facts)
    bound, agree, covers, *shape = numbers[batch:]
    syncs = int(device.type != "cpu")
    rows_begin, odd, still = shape or (1, 0, 0)
    if not covers or not rows_begin:
        raise ValueError(
            f"cu_seq_lens_q must begin at 0, never decrease, have a boundary at the end of each "
            f"of the {batch} rows of {seqlen} tokens, end there, and equal cu_seq_lens_k; got "
            f"{cu_seqlens.tolist() if cu_seqlens is not None else None}"
        )
    if not agree:
        raise ValueError(
            "attention_mask must hide what layout leaves out and nothing else; pass one of them"
        )
    if bound:
        return Structure(None, _BOUND, syncs)
    if layout is not None:
        return Structure(layout, host_syncs=syncs)
    lengths, total = numbers[:batch], sum(numbers[:batch])
    for is_so, reason in (
        (total == 0, _EMPTY),
        (odd, "position_ids that neither count on nor restart at 0"),
        (still, "position_ids that are 0 throughout"),
    ):
        if is_so:
            return Structure(None, reason, syncs)
    cu_rows, indices = made
    indices = None if indices is None or total == batch * seqlen else indices[:total]
    documents = None if codes is None else _documents(codes)
    if documents is None or len(documents) == sum(length > 0 for length in lengths):
        found = VarlenLayout(tuple(lengths), cu_rows, indices, batch, seqlen)
    else:
        found = VarlenLayout.from_slots(documents, indices, batch, seqlen, device=device)
    return Structure(found, host_syncs=syncs)


def _of_flat(flat: Unpadded, batch: int, seqlen: int) -> Structure:
    """Reads what the kernels have counted; the one transfer to the host."""
    numbers = flat.numbers.tolist()
    syncs = int(flat.numbers.device.type != "cpu")
    lengths, total = numbers[:batch], sum(numbers[:batch])
    if any(numbers[batch:]):
        return Structure(None, _BOUND, syncs)
    if total == 0:
        return Structure(None, _EMPTY, syncs)
    indices = None if total == batch * seqlen else flat.indices[:total]
    layout = VarlenLayout(tuple(lengths), flat.cu_seqlens, indices, batch, seqlen)
    return Structure(layout, host_syncs=syncs, tokens=flat.tokens.cut(total))


def flatten_labels(layout: VarlenLayout, labels: Tensor) -> Tensor:
    """Makes labels of the flat row, in which a row's last token does not predict the next row.

    Args:
        layout: of the batch.
        labels: `(batch, seqlen)`.

    Returns:
        `(1, total)`, ignored at each token whose neighbour in front is of another row or was
        padding in between: no output of a real token was compared with those before either.
    """
    if layout.indices is None:
        kept = labels.clone()
        kept[:, :1] = IGNORED
        return kept.reshape(1, -1)
    at = layout.indices
    follows = torch.zeros_like(at, dtype=torch.bool)
    follows[1:] = (at[1:] - at[:-1] == 1) & (at[1:] % layout.seqlen != 0)
    return layout.unpad(labels).masked_fill(~follows, IGNORED).unsqueeze(0)


def _of_shape(layout: VarlenLayout, batch: int, seqlen: int) -> VarlenLayout:
    if (layout.batch, layout.seqlen) != (batch, seqlen):
        raise ValueError(
            f"layout must be of the batch's shape {(batch, seqlen)}, "
            f"got {(layout.batch, layout.seqlen)}"
        )
    return layout


def _real(
    batch: int,
    seqlen: int,
    device: torch.device,
    key_padding_mask: Tensor | None,
    layout: VarlenLayout | None,
) -> Tensor:
    if layout is not None and layout.indices is not None:
        real = torch.zeros(batch * seqlen, dtype=torch.bool, device=device)
        return real.index_fill_(0, layout.indices, True).view(batch, seqlen)
    if layout is None and key_padding_mask is not None:
        return key_padding_mask.to(device) != 0
    return torch.ones(batch, seqlen, dtype=torch.bool, device=device)


def _irregular(positions: Tensor, zero: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Finds positions that mean no packing: jumps to anything but 0, and rows that stay at 0."""
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, -1).cummax(1).values  # the last real slot up to each
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    previous = positions.gather(1, before.clamp(min=0))
    # Behind a hole positions go on by real tokens or by slots: anything else may be a document
    # whose first tokens are padding.
    follows = (positions == previous + 1) | (positions == previous + columns - before)
    odd = real & (before >= 0) & ~zero & ~follows
    still = (zero | ~real).all(1) & (real.sum(1) > 1)
    return odd.any(), still.any()


def _edges(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    # Clamped, since an index out of bounds would end the process; _covers tells.
    slots = batch * seqlen
    edges = torch.zeros(slots + 1, dtype=torch.bool, device=cu_seqlens.device)
    edges.index_fill_(0, cu_seqlens.long().clamp(0, slots), True)
    return edges[:-1].view(batch, seqlen)


def _bound(real: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Finds labels that the unpatched loss compares with an output at padding."""
    bound = torch.zeros_like(real)
    if labels is not None:
        # The first slot's label is compared with nothing.
        counted = labels.to(real.device)[:, 1:] != IGNORED
        bound[:, 1:] |= counted & ~(real[:, 1:] & real[:, :-1])
    if shift_labels is not None:
        bound |= (shift_labels.to(real.device) != IGNORED) & ~real
    return bound


def _covers(real: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor:
    """Whether cu_seqlens run over all slots, and say the same of queries and keys."""
    covers = torch.ones((), dtype=torch.bool, device=real.device)
    if cu_seqlens is None:
        return covers
    edges = cu_seqlens.to(real.device)
    covers = (edges[0] == 0) & (edges[-1] == real.numel()) & (edges[1:] >= edges[:-1]).all()
    if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens:
        return covers
    if cu_seqlens_k.shape != cu_seqlens.shape:
        return torch.zeros_like(covers)
    return covers & (cu_seqlens_k.to(real.device) == edges).all()


def _agree(real: Tensor, key_padding_mask: Tensor | None, layout: VarlenLayout | None) -> Tensor:
    """Whether a mask says what a layout says."""
    if layout is None or key_padding_mask is None:
        return torch.ones((), dtype=torch.bool, device=real.device)
    return ((key_padding_mask.to(real.device) != 0) == real).all()


def _made(real: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Makes the boundaries of rows, and the real slots in front of a buffer for all of them.

    How many there are is not known yet, and to wait for it would leave the device without work.
    """
    cu_rows = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    if key_padding_mask is None:
        return cu_rows, None
    flat = real.flatten()
    slots = flat.numel()
    place = torch.where(flat, flat.cumsum(0) - 1, slots)
    indices = torch.empty(slots + 1, dtype=torch.int64, device=real.device)
    return cu_rows, indices.scatter_(0, place, torch.arange(slots, device=real.device))


def _fetch(
    real: Tensor, starts: Tensor | None, facts: list[Tensor]
) -> tuple[list[int], Tensor | None]:
    """Copies to the host, at once: the length of each row, the facts, and where documents start.

    Returns:
        The numbers, and uint8 `(batch * seqlen,)`: 1 real, 2 the start of a document.
    """
    numbers = torch.cat([real.sum(1), torch.stack(facts).long()])
    if starts is None:
        return numbers.tolist(), None
    # A token starts a document if a start lies between it and the real token in front of it.
    count = starts.cumsum(1)
    seen = torch.where(real, count, -1).cummax(1).values
    begins = real & (count > F.pad(seen[:, :-1], (1, 0), value=-1))
    codes = real.to(torch.uint8) + 2 * begins.to(torch.uint8)
    fetched = torch.cat([numbers.view(torch.uint8), codes.flatten()]).cpu()
    size = 8 * numbers.numel()
    # A copy, since eight-byte numbers have to begin at a multiple of eight.
    return fetched[:size].clone().view(torch.int64).tolist(), fetched[size:]


def _documents(codes: Tensor) -> list[int]:
    """Counts the tokens of each document, from the bytes of all slots on the host."""
    real = codes[codes != 0]
    starts = (real > 1).nonzero().squeeze(1)
    return torch.diff(starts, append=starts.new_tensor([real.numel()])).tolist()
