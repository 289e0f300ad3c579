"""Padded batches with random lengths, and the same tokens flattened by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        lengths: real tokens of each row.
        input_ids: int64 `(batch, seqlen)`, 0 at padding.
        attention_mask: int64 `(batch, seqlen)`.
        labels: int64 `(batch, seqlen)`, -100 at padding.
    """

    lengths: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def padded(self) -> dict[str, Any]:
        """Makes a model's arguments as a trainer's collator gives them."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
            "use_cache": False,
        }

    def without_mask(self) -> dict[str, Any]:
        """Makes the arguments without the mask: right only where padding is on the right."""
        return {**self.padded(), "attention_mask": None}

    def flattened(self) -> dict[str, Any]:
        """Makes the arguments that a user writes to flatten a batch by hand for flash attention."""
        real = self.attention_mask.bool()
        device = self.input_ids.device
        starts = [0, *accumulate(self.lengths)]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        labels = self.labels[real]
        # A document's first token must not be predicted from the one before it.
        labels[cu_seqlens[:-1].long()] = IGNORED
        positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])
        return {
            "input_ids": self.input_ids[real].unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "labels": labels.unsqueeze(0),
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
            "use_cache": False,
        }

    def widened(self, columns: int) -> Batch:
        """Adds columns of padding: the same real tokens in a batch of another shape."""
        if columns == 0:
            return self

        def widen(rows: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(rows, (0, columns), value=value)

        return Batch(
            self.lengths,
            widen(self.input_ids, 0),
            widen(self.attention_mask, 0),
            widen(self.labels, IGNORED),
        )


def draw_lengths(batch: int, seqlen: int, share: float, rng: random.Random) -> tuple[int, ...]:
    """Draws the rows' lengths: one row is full, and the real tokens are a given share of all slots.

    Args:
        batch: rows.
        seqlen: slots of a row, the length of the longest.
        share: of real tokens, above `1 / batch`.
        rng: where the lengths come from.
    """
    if share >= 1 or batch == 1:
        return (seqlen,) * batch
    rest = round(share * batch * seqlen) - seqlen
    low = max(1, seqlen // 32)
    if not low * (batch - 1) <= rest <= seqlen * (batch - 1):
        raise ValueError(
            f"share must leave each of {batch} rows {low} to {seqlen} tokens, got {share}"
        )
    # Uniform lengths, moved towards their bounds until the total is met.
    lengths = [rng.randint(low, seqlen) for _ in range(batch - 1)]
    while (missing := rest - sum(lengths)) != 0:
        at = rng.randrange(batch - 1)
        step = max(-64, min(64, missing))
        lengths[at] = max(low, min(seqlen, lengths[at] + step))
    lengths.insert(rng.randrange(batch), seqlen)
    return tuple(lengths)


def make_batch(
    lengths: Sequence[int],
    seqlen: int,
    vocab_size: int,
    rng: random.Random,
    device: torch.device | str,
) -> Batch:
    """Makes a batch of random tokens.

    Args:
        lengths: real tokens of each row.
        seqlen: slots of a row.
        vocab_size: tokens are drawn from 1 up to it.
        rng: seeds the tokens.
        device: where the batch goes.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    tokens = torch.randint(1, vocab_size, (len(lengths), seqlen), generator=generator)
    real = torch.arange(seqlen) < torch.tensor(lengths).unsqueeze(1)
    return Batch(
        lengths=tuple(lengths),
        input_ids=(tokens * real).to(device),
        attention_mask=real.long().to(device),
        labels=tokens.masked_fill(~real, IGNORED).to(device),
    )
