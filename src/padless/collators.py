"""Collators for `Trainer` or a `DataLoader`: one packs examples into a row, one only pads.

Knows nothing of models. Either batch trains a patched model to the same weights; the packed one
needs no mask and lets a patched model run without any host synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from padless.layout import VarlenLayout

_IGNORED = -100  # the label that transformers' losses ignore

Example = Mapping[str, Any]


@dataclass(frozen=True)
class PackingCollator:
    """Puts examples end to end into one row in which none sees another.

    Each example has `input_ids` and may have `labels` (default: its ids) and `attention_mask`
    (tokens at 0 are dropped).

    Attributes:
        with_layout: hand over a `VarlenLayout` as `layout`, which spares a patched model from
            reading the boundaries back from the device. Without it the row has only what
            transformers knows as well: `position_ids`, `cu_seq_lens_q/k` and `max_length_q/k`.

    Raises:
        ValueError: there is no example, one has no token, or labels are not of its length.
    """

    with_layout: bool = True

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collates.

        Returns:
            `input_ids`, `labels` and `position_ids`, int64 `(1, total)`; the first label of each
            example is -100, since nothing in front of it may predict it; and the boundaries.
        """
        ids, labels = _read(examples)
        layout = VarlenLayout.from_lengths([len(each) for each in ids])
        for each in labels:
            each[0] = _IGNORED
        batch: dict[str, Any] = {
            "input_ids": torch.cat(ids).unsqueeze(0),
            "labels": torch.cat(labels).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(each)) for each in ids]).unsqueeze(0),
        }
        if self.with_layout:
            batch["layout"] = layout
        else:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = layout.cu_seqlens
            batch["max_length_q"] = batch["max_length_k"] = layout.max_seqlen
        return batch


@dataclass(frozen=True)
class PaddingCollator:
    """Pads examples to the longest: the ordinary batch, for comparison or for unpatched models.

    Each example has `input_ids` and may have `labels` (default: its ids) and `attention_mask`
    (tokens at 0 are dropped).

    Attributes:
        pad_token_id: the id that stands at padding.
        padding_side: "right" or "left".
        pad_to_multiple_of: pad on to a multiple of so many tokens.

    Raises:
        ValueError: there is no example, one has no token, labels are not of its length, or an
            attribute is out of range.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {self.padding_side!r}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be 1 or more, got {self.pad_to_multiple_of}")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collates.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 `(batch, seqlen)`; labels are -100 at
            padding and at the first token of an example.
        """
        ids, labels = _read(examples)
        longest = max(len(each) for each in ids)
        seqlen = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        for each in labels:
            each[0] = _IGNORED
        return {
            "input_ids": self._pad(ids, seqlen, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(each) for each in ids], seqlen, 0),
            "labels": self._pad(labels, seqlen, _IGNORED),
        }

    def _pad(self, rows: list[Tensor], seqlen: int, value: int) -> Tensor:
        padded = torch.full((len(rows), seqlen), value)
        for row, each in zip(padded, rows, strict=True):
            if self.padding_side == "right":
                row[: len(each)] = each
            else:
                row[seqlen - len(each) :] = each
        return padded


def _read(examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor]]:
    """Reads ids and labels of each example as int64 tensors of its own, without masked tokens."""
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    all_ids, all_labels = [], []
    for number, example in enumerate(examples):
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64).flatten()
        given = example.get("labels")
        labels = (ids if given is None else torch.as_tensor(given, dtype=torch.int64)).flatten()
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels must be as many as input_ids, got {len(labels)} and {len(ids)} "
                f"in example {number}"
            )
        mask = example.get("attention_mask")
        if mask is not None:
            real = torch.as_tensor(mask).flatten() != 0
            ids, labels = ids[real], labels[real]
        if len(ids) == 0:
            raise ValueError(f"examples must have at least one token each, example {number} has 0")
        all_ids.append(ids)
        all_labels.append(labels.clone())
    return all_ids, all_labels
