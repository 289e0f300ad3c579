"""One flat row shared out over a group: who holds what, and how its tokens attend and come back."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from padless.layout import VarlenLayout
from padless.parallel.exchange import gather_tokens
from padless.parallel.group import SequenceGroup
from padless.parallel.ring import attend_in_ring
from padless.parallel.ring_plan import Options, RingPlan
from padless.parallel.split import SequenceSplit, split_balanced, split_evenly
from padless.parallel.ulysses import Attend, attend_by_heads

ALGORITHMS = ("ulysses", "ring")


@dataclass(eq=False)
class Shard:
    """What one rank needs to know of a row that the ranks of a group share.

    Attributes:
        group: the ranks.
        algorithm: "ulysses" or "ring".
        layout: of the whole row.
        split: who holds which of its tokens.
        indices: int64 `(own,)`, places of this rank's tokens in the row, in this rank's order.
    """

    group: SequenceGroup
    algorithm: str
    layout: VarlenLayout
    split: SequenceSplit
    indices: Tensor
    _plans: dict[Any, RingPlan] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layout: VarlenLayout,
        group: SequenceGroup,
        algorithm: str,
        split: SequenceSplit | None = None,
    ) -> Shard:
        """Shares out a row.

        Args:
            layout: of the whole row; the same on every rank.
            group: the ranks.
            algorithm: "ulysses" or "ring".
            split: of this row by this algorithm, where there is one already.

        Raises:
            ValueError: no algorithm has this name.
        """
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"sequence_parallel must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}"
            )
        if split is None:
            cut = split_evenly if algorithm == "ulysses" else split_balanced
            split = cut(layout.lengths, group.size)
        indices = _places(split, group.rank)
        device = layout.cu_seqlens.device
        return cls(group, algorithm, layout, split, indices.to(device, non_blocking=True))

    @property
    def own(self) -> int:
        """Tokens of this rank."""
        return self.split.totals[self.group.rank]

    def take(self, row: Tensor) -> Tensor:
        """Picks this rank's tokens of the whole row: `(total, ...)` to `(own, ...)`."""
        return row.index_select(0, self.indices.to(row.device))

    def gather(self, local: Tensor) -> Tensor:
        """Collects the tokens of all ranks: `(own, ...)` to `(total, ...)`, in the row's order.

        Note:
            Every rank of the group has to call it. Its gradient is the sum of all ranks'.
        """
        ranked = gather_tokens(local, self.split.totals, self.group)
        return ranked.index_select(0, self._order.to(local.device))

    @functools.cached_property
    def _order(self) -> Tensor:
        ranks = range(self.group.size)
        return torch.cat([_places(self.split, rank) for rank in ranks]).argsort()

    def ring_plan(self, options: Options, device: torch.device) -> RingPlan:
        """Makes this rank's plan, once for all layers."""
        key = (options, device)
        if key not in self._plans:
            plan = RingPlan.of(self.split, self.group.rank, options, device)
            if any(plan.shared) and not all(plan.shared):
                self.group.meet(device)
            self._plans[key] = plan
        return self._plans[key]

    def attend_in_ring(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """Attends by the ring; see `ring_attention`."""
        return attend_in_ring(q, k, v, self.ring_plan(options, q.device), self.group)

    def attend_by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, *, chunks: int | None = None
    ) -> Tensor:
        """Attends by Ulysses; see `ulysses_attention`."""
        return attend_by_heads(q, k, v, self.split.totals, self.group, attend, chunks=chunks)


def _places(split: SequenceSplit, rank: int) -> Tensor:
    stretches = [torch.arange(start, stop) for start, stop in split.ranges(rank)]
    return torch.cat(stretches) if stretches else torch.empty(0, dtype=torch.int64)
