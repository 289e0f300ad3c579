"""What an attention mask means at the layer, whatever form the transformers version gives it.

A mask arrives as None, as 2D key padding (bool or integer), or as 4D (bool, or float to be added),
sized to the call or larger. Most are "causal, and these keys are padding": those are recognised, so
that the packed and the causal kernels can serve them. Everything else is kept dense and exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padless.layout import VarlenLayout
from padless.reference import causal_visible

# A float mask hides with its dtype's minimum or with -inf; anything this low hides in every dtype.
_HIDDEN_BELOW = -1e4


@dataclass(frozen=True)
class KeyPadding:
    """Which keys are real, and on which side the padding is.

    Attributes:
        layout_k: real keys of each row.
        layout_q: real queries of each row: the last seqlen_q columns of the same mask.
        is_right: no row has padding in front of a real token.
    """

    layout_k: VarlenLayout
    layout_q: VarlenLayout
    is_right: bool

    @property
    def is_trivial(self) -> bool:
        """Whether every key is real."""
        return self.layout_k.indices is None


class LayerMask:
    """The mask of one call, read when asked.

    Args:
        raw: None, `(batch, seqlen_k)`, or `(batch or 1, num_heads or 1, seqlen_q, >= seqlen_k)`.
        batch: rows.
        num_heads: query heads.
        seqlen_q: queries of the call.
        seqlen_k: keys of the call, cached ones included.
        is_causal: whether None means causal (bottom-right) or everything.
        cache_position: int `(seqlen_q,)`; picks the rows of a mask that has more than the call.
        is_aligned: the last key is the last query's own; not so for a preallocated cache.
        device: where the queries are.

    Raises:
        TypeError: the mask's dtype means nothing at its rank.
        ValueError: the mask's shape fits nothing; a 2D mask that is meant to be added.
    """

    def __init__(
        self,
        raw: Tensor | None,
        *,
        batch: int,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        is_causal: bool,
        cache_position: Tensor | None,
        is_aligned: bool,
        device: torch.device,
    ) -> None:
        self.raw = raw
        self.shape = (batch, num_heads, seqlen_q, seqlen_k)
        self.is_causal = is_causal
        self.is_aligned = is_aligned
        self.device = device
        self._cache_position = cache_position
        if raw is not None:
            self._validate(raw)

    def _validate(self, raw: Tensor) -> None:
        batch, num_heads, seqlen_q, seqlen_k = self.shape
        if raw.dim() == 2:
            fits = raw.shape == (batch, seqlen_k)
        else:
            rows = raw.dim() == 4 and (
                raw.shape[2] == seqlen_q
                or (self._cache_position is not None and raw.shape[2] > seqlen_q)
            )
            fits = (
                rows
                and raw.shape[0] in (1, batch)
                and raw.shape[1] in (1, num_heads)
                and raw.shape[3] >= seqlen_k
            )
        if not fits:
            raise ValueError(
                f"attention_mask must have shape (batch, keys) = {(batch, seqlen_k)} or "
                f"(batch, 1, queries, keys) = {(batch, 1, seqlen_q, seqlen_k)}, "
                f"got {tuple(raw.shape)}"
            )
        if raw.dim() == 4 and raw.dtype != torch.bool and not raw.is_floating_point():
            raise TypeError(
                f"a 4D attention_mask must be bool (True = attend) or float (added to the "
                f"scores), got {raw.dtype}"
            )
        if raw.dim() == 2 and raw.is_floating_point():
            _kept_on(raw, "is 0 or 1", lambda: _refuse_additive(raw))

    def dense(self) -> Tensor | None:
        """Returns the mask as `(batch or 1, num_heads or 1, seqlen_q, seqlen_k)`.

        Returns:
            bool (True = attend) or additive float, as it came; None if every key is visible.
        """
        if self.raw is None:
            return self._causal()
        if self.raw.dim() == 4:
            return self._cut(self.raw)
        visible = (self.raw != 0)[:, None, None, :]
        causal = self._causal()
        return visible if causal is None else visible & causal

    def visible(self) -> Tensor | None:
        """Returns the dense mask as bool or additive float in which every query sees a key.

        A query that may see nothing (one that is itself padding) sees everything instead: its
        output is not read, but a softmax over nothing would be NaN and poison the gradients.
        """
        dense = self.dense()
        if dense is None:
            return None
        seen = _seen(dense)
        blind = ~seen.any(-1, keepdim=True)
        if dense.dtype == torch.bool:
            return dense | blind
        return dense.masked_fill(blind, 0.0)

    def key_padding(self) -> KeyPadding | None:
        """Recognises "causal, and these keys are padding"; None if the mask is anything else.

        Note:
            Synchronises twice per mask tensor, not per layer: the answer is kept on the tensor.
        """
        if not self.is_aligned or (self.raw is None and not self.is_causal):
            return None
        if self.raw is None:
            batch, _, seqlen_q, seqlen_k = self.shape
            layouts = [
                VarlenLayout.from_rows(batch, n, device=self.device) for n in (seqlen_q, seqlen_k)
            ]
            return KeyPadding(layouts[1], layouts[0], is_right=True)
        if self.raw.dim() == 2 and not self.is_causal:
            return None
        return _kept_on(self.raw, (self.shape, self.is_causal), self._read_key_padding)

    def _read_key_padding(self) -> KeyPadding | None:
        assert self.raw is not None
        batch, _, seqlen_q, seqlen_k = self.shape
        if self.raw.dim() == 2:
            real = self.raw != 0
            is_known = torch.ones((), dtype=torch.bool, device=real.device)
        else:
            if self.raw.shape[1] != 1:
                return None
            dense = self._cut(self.raw)[:, 0].expand(batch, -1, -1)  # (b, q, k)
            seen = _seen(dense)
            # The last query is behind every key: what it sees is what is real.
            real = seen[:, -1]
            expected = real[:, None, :] & causal_visible(seqlen_q, seqlen_k, real.device)
            # A query that is padding itself sees nothing, or everything where transformers has
            # opened its row: not read. One that sees some keys is a document of its own.
            is_padding = ~real[:, seqlen_k - seqlen_q :, None]
            unread = is_padding & (seen == seen[:, :, :1]).all(-1, keepdim=True)
            is_known = ((seen == expected) | unread).all()
            if dense.dtype != torch.bool:
                is_known = is_known & ((dense == 0) | ~seen | unread).all()
        # Right padding: never a real token behind one that is not.
        is_right = (real[:, 1:] <= real[:, :-1]).all()
        known, right = torch.stack([is_known, is_right]).tolist()
        if not known:
            return None
        layout_k = VarlenLayout.from_mask(real)
        layout_q = layout_k
        if seqlen_q != seqlen_k:
            layout_q = VarlenLayout.from_mask(real[:, seqlen_k - seqlen_q :])
        return KeyPadding(layout_k, layout_q, bool(right))

    def _causal(self) -> Tensor | None:
        _, _, seqlen_q, seqlen_k = self.shape
        if not self.is_causal or seqlen_q == 1:
            return None
        return causal_visible(seqlen_q, seqlen_k, self.device)[None, None]

    def _cut(self, raw: Tensor) -> Tensor:
        _, _, seqlen_q, seqlen_k = self.shape
        if raw.shape[2] != seqlen_q:
            # transformers 4.38 hands over one mask for all positions that the model can take.
            raw = raw[:, :, self._cache_position]
        return raw[..., :seqlen_k]


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > _HIDDEN_BELOW


def _refuse_additive(mask: Tensor) -> None:
    if (mask < 0).any():
        raise ValueError(
            "a 2D attention_mask must be 1 at real tokens and 0 at padding, "
            "got negative values; a mask to be added must be 4D"
        )


def _kept_on(tensor: Tensor, key: Any, compute: Any) -> Any:
    """Computes once for each key and version of a tensor, and keeps the answer on the tensor.

    All layers of a forward get the same mask object, so this is once a forward; the answer lives
    exactly as long as the mask does, and an edit in place makes it stale.
    """
    if tensor.is_inference():
        # Such tensors count no versions: an edit could not be noticed.
        return compute()
    kept = getattr(tensor, "_padless_reading", None)
    if kept is None or kept[0] != tensor._version:
        kept = (tensor._version, {})
        tensor._padless_reading = kept  # type: ignore[attr-defined]
    if key not in kept[1]:
        kept[1][key] = compute()
    return kept[1][key]
