"""Left-padded batches of prompts, and widths that never meet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The narrowest batch of a case with new lengths, in parts of the widest.
_NARROWEST = 9 / 16


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens, padded on the left.

    Attributes:
        lengths: real tokens of each row.
        input_ids: int64 `(batch, seqlen)`, 0 at padding.
        attention_mask: int64 `(batch, seqlen)`.
    """

    lengths: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def seqlen(self) -> int:
        """Slots of a row."""
        return self.input_ids.shape[1]

    def padded(self) -> dict[str, Any]:
        """Makes the arguments of `generate`."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def listed(self) -> list[list[int]]:
        """Makes a list of the rows' real tokens."""
        rows = zip(self.input_ids.tolist(), self.lengths, strict=True)
        return [row[len(row) - length :] for row, length in rows]

    def widened(self, columns: int) -> Prompts:
        """Adds columns of padding: the same prompts in a batch of another shape."""
        if columns == 0:
            return self
        pad = torch.nn.functional.pad
        return Prompts(
            self.lengths,
            pad(self.input_ids, (columns, 0)),
            pad(self.attention_mask, (columns, 0)),
        )

    def narrowed(self) -> Prompts:
        """Drops the first column: rows without padding lose a token, and the shape is another."""
        return Prompts(
            tuple(min(length, self.seqlen - 1) for length in self.lengths),
            self.input_ids[:, 1:],
            self.attention_mask[:, 1:],
        )


def make_prompts(
    lengths: Sequence[int],
    seqlen: int,
    vocab_size: int,
    rng: random.Random,
    device: torch.device | str,
) -> Prompts:
    """Makes prompts of random tokens.

    Args:
        lengths: real tokens of each row.
        seqlen: slots of a row.
        vocab_size: tokens are drawn from 1 up to it.
        rng: seeds the tokens.
        device: where the batch goes.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    tokens = torch.randint(1, vocab_size, (len(lengths), seqlen), generator=generator)
    real = torch.arange(seqlen) >= seqlen - torch.tensor(lengths).unsqueeze(1)
    return Prompts(tuple(lengths), (tokens * real).to(device), real.long().to(device))


def new_widths(seqlen: int, tokens: int, variants: int, rng: random.Random) -> list[int]:
    """Draws widths of turns whose lengths of keys never meet, the widest first.

    In a turn variant number v takes prompts of `width + 2 * v - 1` slots and of one more, and ends
    at `tokens` keys more: what is kept by shape, such as a plan of cuDNN, serves one turn only.

    Args:
        seqlen: slots that no batch passes.
        tokens: that are generated behind the first one.
        variants: that add columns of their own.
        rng: of the order.
    """
    block = tokens + 2 * variants
    widest = seqlen - 2 * (variants - 1)
    widths = list(range(widest, int(_NARROWEST * seqlen), -block))
    rest = widths[1:]
    rng.shuffle(rest)
    return widths[:1] + rest
