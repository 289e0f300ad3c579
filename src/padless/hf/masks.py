"""What an attention mask means at the layer, whatever form the transformers version gives it.

A mask arrives as None, as 2D key padding (bool or integer), or as 4D (bool, or float to be added),
sized to the call or larger. Most are "causal, and these keys are padding": those are recognised, so
that the packed and the causal kernels can serve them. Everything else is kept dense and exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from padless.layout import VarlenLayout
from padless.reference import causal_visible

# A float mask hides with its dtype's minimum or with -inf; anything this low hides in every dtype.
_HIDDEN_BELOW = -1e4


@dataclass(frozen=True)
class PackedMask:
    """A mask that the packed kernels can serve: causal within sequences, some slots padding.

    Attributes:
        layout_k: the sequences in the keys.
        layout_q: the same in the queries, the last seqlen_q columns of each row.
        causal_suffices: the causal mask alone gives real queries the same: one sequence a row, and
            no padding in front of a real token.
    """

    layout_k: VarlenLayout
    layout_q: VarlenLayout
    causal_suffices: bool


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
        boundaries: where packed documents begin, if raw is None and the call says so: cu_seqlens
            `(documents + 1,)`, or position_ids `(batch or 1, seqlen_q)` that restart.
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
        boundaries: Tensor | None = None,
    ) -> None:
        self.raw = raw
        self.shape = (batch, num_heads, seqlen_q, seqlen_k)
        self.is_causal = is_causal
        self.is_aligned = is_aligned
        self.device = device
        self._cache_position = cache_position
        # A mask says it all, and behind a cache there is no packing.
        self._boundaries = boundaries if raw is None and seqlen_q == seqlen_k else None
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
        if self.raw is None and self._boundaries is not None:
            return self._within_documents()
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

    def packed(self) -> PackedMask | None:
        """Recognises causal attention within packed or padded rows; None for any other mask.

        Note:
            Synchronises twice per mask tensor, not per layer: the answer is kept on the tensor.
        """
        if not self.is_aligned or (
            not self.is_causal and (self.raw is None or self.raw.dim() == 2)
        ):
            return None
        if self._boundaries is not None:
            documents = self._documents()
            # Documents end where rows do: as many of both are the rows themselves.
            return PackedMask(documents, documents, len(documents.lengths) == self.shape[0])
        if self.raw is None:
            batch, _, seqlen_q, seqlen_k = self.shape
            layout_k = layout_q = VarlenLayout.from_rows(batch, seqlen_k, device=self.device)
            if seqlen_q != seqlen_k:
                layout_q = VarlenLayout.from_rows(batch, seqlen_q, device=self.device)
            return PackedMask(layout_k, layout_q, causal_suffices=True)
        if self.raw.dim() == 4 and self.raw.shape[2] != self.shape[2]:
            # Which rows of it are meant differs between calls: nothing to keep on the mask.
            return self._recognise()
        return _kept_on(self.raw, (self.shape, self.is_causal), self._recognise)

    def _documents(self) -> VarlenLayout:
        """Builds the layout of packed documents, once for each boundaries tensor."""
        boundaries = self._boundaries
        assert boundaries is not None
        batch, _, seqlen, _ = self.shape

        def build() -> VarlenLayout:
            if boundaries.dim() == 1:
                layout = VarlenLayout.from_cu_seqlens(boundaries)
            else:
                layout = VarlenLayout.from_position_ids(boundaries.expand(batch, -1))
            if layout.total != batch * seqlen:
                raise ValueError(
                    f"cu_seq_lens_q must end at the {batch * seqlen} tokens of the batch, "
                    f"got {layout.total}"
                )
            ends = set(accumulate(layout.lengths))
            if not ends.issuperset(range(seqlen, batch * seqlen + 1, seqlen)):
                raise ValueError(
                    f"cu_seq_lens_q must have a boundary at the end of each row of {seqlen} "
                    f"tokens, got {boundaries.tolist()}"
                )
            return replace(layout, batch=batch, seqlen=seqlen)

        return _kept_on(boundaries, (batch, seqlen), build)

    def _within_documents(self) -> Tensor:
        batch, _, seqlen, _ = self.shape
        lengths = torch.tensor(self._documents().lengths, device=self.device)
        documents = torch.arange(lengths.numel(), device=self.device).repeat_interleave(lengths)
        documents = documents.view(batch, 1, seqlen)
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # (b, 1, s, s)
        causal = self._causal()
        return same if causal is None else same & causal

    def _recognise(self) -> PackedMask | None:
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
        return PackedMask(layout_k, layout_q, bool(right))

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
