"""The inputs of one attention layer, padded and flat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padless.layout import VarlenLayout


@dataclass
class LayerBatch:
    """The inputs of a layer, padded and flat.

    Attributes:
        layout: where the real tokens are.
        mask: bool `(batch, seqlen)`; None if all tokens are real.
        hidden: `(batch, seqlen, hidden_size)`, a leaf.
        flat_hidden: `(1, total, hidden_size)`, a leaf with the same real tokens.
        dout: gradient of the padded output, 0 at padding, as a loss leaves it.
        flat_dout: gradient of the flat output.
    """

    layout: VarlenLayout
    mask: Tensor | None
    hidden: Tensor
    flat_hidden: Tensor
    dout: Tensor
    flat_dout: Tensor

    @classmethod
    def draw(
        cls, lengths: Sequence[int], seqlen: int, hidden_size: int, dtype: Any, device: str
    ) -> LayerBatch:
        """Draws a batch of right-padded rows.

        Args:
            lengths: real tokens of each row.
            seqlen: slots of a row.
            hidden_size: of the residual stream.
            dtype: of its numbers.
            device: where they are.
        """
        batch = len(lengths)
        real = torch.arange(seqlen, device=device) < torch.tensor(lengths, device=device)[:, None]
        layout = VarlenLayout.from_mask(real)
        shape = (batch, seqlen, hidden_size)
        hidden, dout = torch.randn(2, *shape, dtype=dtype, device=device)
        dout = dout * real[..., None]
        return cls._of(layout, real, hidden, dout)

    @classmethod
    def draw_documents(
        cls, lengths: Sequence[int], hidden_size: int, dtype: Any, device: str
    ) -> LayerBatch:
        """Draws one row of packed documents."""
        layout = VarlenLayout.from_lengths(lengths, device=device)
        shape = (1, sum(lengths), hidden_size)
        hidden, dout = torch.randn(2, *shape, dtype=dtype, device=device)
        return cls._of(layout, None, hidden, dout)

    @classmethod
    def _of(
        cls, layout: VarlenLayout, real: Tensor | None, hidden: Tensor, dout: Tensor
    ) -> LayerBatch:
        return cls(
            layout=layout,
            mask=None if layout.indices is None else real,
            hidden=hidden.requires_grad_(),
            flat_hidden=layout.unpad(hidden.detach()).unsqueeze(0).clone().requires_grad_(),
            dout=dout,
            flat_dout=layout.unpad(dout).unsqueeze(0).clone(),
        )

    @property
    def position_ids(self) -> Tensor:
        """Positions of the flat tokens: int64 `(1, total)`."""
        lengths = self.layout.lengths
        device = self.hidden.device
        return torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
