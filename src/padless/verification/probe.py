"""The perturbation probe: change one token, and exactly what may depend on it changes.

Needs no tolerance and no second model, and finds a leak between rows or documents, lost causality,
and a mask that is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProbeResult:
    """What a probe saw.

    Attributes:
        probed: tokens that were changed, as (row, column).
        leaked: (changed row, changed column, row, column) of outputs that changed and must not.
        missed: the same of outputs that had to change and did not.
    """

    probed: tuple[tuple[int, int], ...]
    leaked: tuple[tuple[int, int, int, int], ...]
    missed: tuple[tuple[int, int, int, int], ...]

    @property
    def passed(self) -> bool:
        """Whether exactly the right outputs changed."""
        return not self.leaked and not self.missed

    def __str__(self) -> str:
        if self.passed:
            return f"changed {len(self.probed)} tokens: exactly their successors follow"
        parts = []
        for name, found in (("leaked", self.leaked), ("missed", self.missed)):
            if found:
                row, column, at_row, at_column = found[0]
                parts.append(
                    f"{len(found)} {name}, first: token ({row}, {column}) "
                    f"to output ({at_row}, {at_column})"
                )
        return "; ".join(parts)


@torch.no_grad()
def perturbation_probe(
    run: Callable[[Tensor], Tensor],
    ids: Tensor,
    real: Tensor,
    *,
    vocab_size: int,
    documents: Tensor | None = None,
    tokens: tuple[tuple[int, int], ...] | None = None,
) -> ProbeResult:
    """Changes one token at a time and compares which outputs change with which may.

    Args:
        run: maps ids `(batch, seqlen)` to outputs `(batch, seqlen, ...)`; deterministic.
        ids: int64 `(batch, seqlen)`.
        real: bool `(batch, seqlen)`, True where a token is real; only there outputs are compared.
        vocab_size: ids stay below it.
        documents: int `(batch, seqlen)`, packed documents that must not see each other; default:
            each row is one.
        tokens: which to change; default: each document's first, middle and last real token.

    Returns:
        What leaked and what was missed.

    Note:
        Outputs are compared bit by bit: equal inputs of equal shapes give equal bits.
    """
    if documents is None:
        documents = torch.zeros_like(ids)
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
    documents = documents + rows * (int(documents.max()) + 1)
    tokens = _default_tokens(documents, real) if tokens is None else tokens
    columns = torch.arange(ids.shape[1], device=ids.device)[None]
    base = run(ids)
    leaked: list[tuple[int, int, int, int]] = []
    missed: list[tuple[int, int, int, int]] = []
    for row, column in tokens:
        other = ids.clone()
        other[row, column] = (ids[row, column] + 1) % vocab_size
        changed = (run(other) != base).flatten(2).any(-1)
        may = (documents == documents[row, column]) & (columns >= column)
        for found, wrong in ((leaked, changed & ~may), (missed, may & ~changed)):
            found.extend((row, column, r, c) for r, c in (wrong & real).nonzero().tolist())
    return ProbeResult(tuple(tokens), tuple(leaked), tuple(missed))


def _default_tokens(documents: Tensor, real: Tensor) -> tuple[tuple[int, int], ...]:
    tokens: set[tuple[int, int]] = set()
    for document in documents.unique().tolist():
        places = ((documents == document) & real).nonzero().tolist()
        if places:
            tokens.update(tuple(places[i]) for i in (0, len(places) // 2, -1))
    return tuple(sorted(tokens))
