"""Rows of a `generate` call that have ended: left out of its steps once that pays."""

from __future__ import annotations

import torch
from torch import Tensor

from padless.generation.store import RaggedStore

# The device is asked which rows are left once in so many steps.
_ASK_EVERY = 16
# What leaving rows out has to save in reading keys and values on a GPU, where a step is captured
# anew for it: about 50 ms at the 2.7 TB/s of an H100.
_CAPTURE_BYTES = 2**37


class EndedRows:
    """Which rows of a `generate` call have ended, and which of them steps still compute.

    Args:
        end_tokens: int64 `(n,)`, after which `generate` goes on with the row as padding.
        rows: of the call.

    Attributes:
        kept: int64 `(kept,)`, the rows that steps compute; None while it is all of them.

    Note:
        Valid where nobody is given what is computed of a row behind its end: its tokens are
        `generate`'s own padding then.
    """

    def __init__(self, end_tokens: Tensor, rows: int) -> None:
        self.kept: Tensor | None = None
        self._end_tokens = end_tokens
        self._rows = rows
        self._ended = torch.zeros(rows, dtype=torch.bool, device=end_tokens.device)
        self._steps = 0
        # Of steps since the device was asked. A caller that writes over one hides a token at most:
        # whatever is in there was a step's.
        self._unread: list[Tensor] = []

    def see(self, ids: Tensor) -> None:
        """Takes the tokens that a step is given, and leaves them for when the device is asked.

        Args:
            ids: int64 `(rows, 1)`, each of them chosen by `generate`.
        """
        self._steps += 1
        self._unread.append(ids)

    def leave_out(self, store: RaggedStore) -> None:
        """Takes rows that have ended out of the store, if at most half of its rows have not.

        Note:
            Waits for the device, once in some steps and only where leaving out half of the rows
            would pay.
        """
        if self._steps % _ASK_EVERY:
            return
        tokens = torch.cat(self._unread, 1)
        self._unread.clear()
        self._ended |= (tokens[..., None] == self._end_tokens).flatten(1).any(1)
        if store.batch < 2 or not self._pays(store):
            return
        left = (~self._ended).nonzero().flatten()
        if not 0 < left.shape[0] <= store.batch // 2:
            return
        within = left
        if self.kept is not None:
            within = (self.kept == left[:, None]).nonzero()[:, 1]
        store.leave_out(within)
        self.kept = left

    def pick(self, x: Tensor) -> Tensor:
        """Picks the rows that steps compute of `(rows, ...)`."""
        return x if self.kept is None else x.index_select(0, self.kept)

    def spread(self, logits: Tensor) -> Tensor:
        """Makes logits of all rows from those of a step, zeros at rows that were left out.

        Args:
            logits: `(kept, 1, vocab_size)`.
        """
        if self.kept is None:
            return logits
        return logits.new_zeros(self._rows, *logits.shape[1:]).index_copy_(0, self.kept, logits)

    def _pays(self, store: RaggedStore) -> bool:
        """Whether half of the rows, for as many steps as there were, cost more than a capture."""
        if not self._ended.is_cuda:
            return True
        return store.filled_bytes // 2 * self._steps >= _CAPTURE_BYTES
