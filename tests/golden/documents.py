"""Rows of packed documents, and every way of saying where these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from golden.models import VOCAB
from padless import VarlenLayout

IGNORED = -100
# Lengths of documents in each row; negative is padding.
ROWS = {
    "one row": ((5, 1, 7),),
    "three rows": ((5, 8), (13,), (1, 4, 8)),
    "padding on the right": ((5, 6, -2), (13,), (3, 2, -8)),
    "padding on the left": ((-2, 5, 6), (13,), (-8, 3, 2)),
    "padding between": ((5, -2, 6), (-1, 3, -4, 5), (2, -3, 4, 4)),
}


def draw(rows: str) -> tuple[Tensor, Tensor]:
    """Draws ids of some `ROWS`; returns them and each token's document, `(batch, 13)`."""
    documents = document_numbers(ROWS[rows])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, documents.shape, generator=generator)
    return ids.masked_fill(documents < 0, 0), documents


def layout_of(documents: Tensor) -> VarlenLayout:
    """Makes the layout by which a caller says what it knows already."""
    real = documents >= 0
    lengths = documents[real].unique_consecutive(return_counts=True)[1].tolist()
    indices = None if real.all() else real.flatten().nonzero().squeeze(1)
    return VarlenLayout.from_slots(lengths, indices, *documents.shape)


def document_numbers(rows: Sequence[Sequence[int]]) -> Tensor:
    """Numbers the documents of rows of equal length; a negative length is padding.

    Args:
        rows: lengths of each row's documents, and minus the length of each stretch of padding.

    Returns:
        int64 `(batch, seqlen)`, -1 at padding.
    """
    number = 0
    numbered = []
    for row in rows:
        pieces = []
        for length in row:
            pieces.append(torch.full((abs(length),), number if length > 0 else -1))
            number += length > 0
        numbered.append(torch.cat(pieces))
    return torch.stack(numbered)


def restarting_positions(documents: Tensor) -> Tensor:
    """Positions `(batch, seqlen)` that count from 0 in each document, 0 at padding."""
    positions = torch.zeros_like(documents)
    for number in numbers_of(documents):
        at = documents == number
        positions[at] = torch.arange(int(at.sum()))
    return positions


def visible_within(documents: Tensor) -> Tensor:
    """Which keys queries see: bool `(batch, 1, seqlen, seqlen)`, causal within a document."""
    seqlen = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    return (causal & same & (documents >= 0)[:, None])[:, None]


def document_labels(ids: Tensor, documents: Tensor) -> Tensor:
    """Labels without those at padding and at the first token of each document."""
    labels = ids.masked_fill(documents < 0, IGNORED)
    labels[:, 0] = IGNORED
    labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORED
    return labels


def cu_seqlens_of(documents: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Boundaries over all slots, row after row; padding belongs to a document of its own."""
    row = torch.arange(documents.shape[0])[:, None] * (int(documents.max()) + 2)
    flat = (documents + row).flatten()
    starts = (flat[1:] != flat[:-1]).nonzero().squeeze(1) + 1
    return torch.cat([torch.zeros(1), starts, torch.tensor([flat.numel()])]).to(dtype)


def numbers_of(documents: Tensor) -> list[int]:
    """Lists the documents, without padding."""
    return [number for number in documents.unique().tolist() if number >= 0]
