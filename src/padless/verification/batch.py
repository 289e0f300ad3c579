"""The batches that `verify` runs: the caller's texts, padded on either side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """ids and mask of one padding side.

    Attributes:
        side: "left" or "right".
        ids: int64 `(batch, seqlen)`.
        real: bool `(batch, seqlen)`.
    """

    side: str
    ids: Tensor
    real: Tensor

    @property
    def labels(self) -> Tensor:
        """The ids where a real token is predicted by a real one, -100 elsewhere.

        The first real token of a left-padded row would be predicted from padding.
        """
        labels = self.ids.masked_fill(~self.real, -100)
        labels[:, 1:] = labels[:, 1:].masked_fill(~self.real[:, :-1], -100)
        return labels

    @property
    def position_ids(self) -> Tensor:
        """Counts real tokens of each row from 0."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)

    def mask_for(self, dtype: torch.dtype) -> Tensor:
        """Makes the attention mask for a model of this dtype."""
        return self.real.long()


@dataclass(frozen=True)
class PackedRow(PaddedBatch):
    """The real tokens of a batch as one row, kept apart by a mask of `(1, 1, total, total)`.

    So the unpatched model computes as many rows in each product as a patched one.

    Attributes:
        positions: int64 `(1, total)`, of each token in its own sequence.
    """

    positions: Tensor

    @classmethod
    def of(cls, batch: PaddedBatch) -> PackedRow:
        """Packs a padded batch, its rows one after the other."""
        ids = batch.ids[batch.real].unsqueeze(0)
        positions = batch.position_ids[batch.real].unsqueeze(0)
        return cls("packed", ids, torch.ones_like(ids, dtype=torch.bool), positions)

    @property
    def labels(self) -> Tensor:
        """The ids, -100 where a sequence begins: nothing of its own predicts that one."""
        return self.ids.masked_fill(self.positions == 0, -100)

    @property
    def position_ids(self) -> Tensor:
        """Counts the tokens of each sequence from 0."""
        return self.positions

    def mask_for(self, dtype: torch.dtype) -> Tensor:
        """Makes the additive mask: 0 for keys of one's own sequence that are not behind one."""
        sequence = (self.positions[0] == 0).cumsum(0)
        visible = (sequence[:, None] == sequence[None, :]).tril()
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.ids.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def read_rows(batch: Mapping[str, Any], vocab_size: int) -> list[Tensor]:
    """Takes the real tokens out of a padded batch.

    Args:
        batch: holds `input_ids` int64 `(batch, seqlen)` and, unless all tokens are real,
            `attention_mask` of the same shape, nonzero = real.
        vocab_size: ids must be below it.

    Returns:
        One id tensor a row.

    Raises:
        TypeError: not a mapping of integer tensors.
        ValueError: wrong shapes, an empty row or batch, an id outside the vocabulary.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        came = type(batch).__name__ if ids is None else getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"batch must map 'input_ids' to an integer tensor, got {came}")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(
            f"input_ids must have shape (batch, seqlen) with at least one token, "
            f"got {tuple(ids.shape)}"
        )
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {tuple(ids.shape)}, "
            f"got {tuple(getattr(mask, 'shape', ()))}"
        )
    real = mask != 0
    empty = [row for row, any_real in enumerate(real.any(1).tolist()) if not any_real]
    if empty:
        raise ValueError(
            f"every row of the batch must hold a real token, got padding alone in row {empty[0]}; "
            f"leave such rows out"
        )
    used = ids[real]
    if int(used.min()) < 0 or int(used.max()) >= vocab_size:
        raise ValueError(
            f"input_ids must be in [0, {vocab_size}), got {int(used.min())} to {int(used.max())}"
        )
    return [row[keep] for row, keep in zip(ids, real, strict=True)]


def pad_rows(rows: list[Tensor], side: str, *, pad_id: int = 0) -> PaddedBatch:
    """Pads rows of ids on one side."""
    seqlen = max(row.numel() for row in rows)
    ids = rows[0].new_full((len(rows), seqlen), pad_id)
    real = torch.zeros(len(rows), seqlen, dtype=torch.bool, device=ids.device)
    for i, row in enumerate(rows):
        place = slice(0, row.numel()) if side == "right" else slice(seqlen - row.numel(), seqlen)
        ids[i, place] = row
        real[i, place] = True
    return PaddedBatch(side, ids, real)
