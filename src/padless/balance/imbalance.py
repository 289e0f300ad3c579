"""How far the ranks of a step are apart, over an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from padless.balance.cost import SequenceCost


@dataclass(frozen=True)
class Imbalance:
    """Cost of the slowest rank over the mean of all, which is what the others wait for.

    Attributes:
        steps: of the epoch.
        epoch: sum over the steps of the largest cost, over the sum of the mean costs: time of the
            epoch over what it would take if no rank waited. 1 is best.
        worst: largest over mean cost in the worst step.
    """

    steps: int
    epoch: float
    worst: float

    @classmethod
    def of_costs(cls, costs: Tensor) -> Imbalance:
        """Reads the costs of an epoch.

        Args:
            costs: `(steps, ranks)`, cost or milliseconds of each rank's batch.

        Raises:
            ValueError: costs are not of this shape, or hold nothing.
        """
        if costs.dim() != 2 or costs.numel() == 0:
            raise ValueError(
                f"costs must have shape (steps, ranks) and hold one at least, "
                f"got {tuple(costs.shape)}"
            )
        costs = costs.to(torch.float64)
        most, mean = costs.amax(1), costs.mean(1)
        # A step in which no rank has anything to do keeps nobody waiting.
        worst = torch.where(mean > 0, most / mean, 1.0)
        total = mean.sum().item()
        return cls(len(costs), most.sum().item() / total if total else 1.0, worst.max().item())

    @classmethod
    def of_batches(
        cls,
        batches: Sequence[Iterable[Sequence[int]]],
        lengths: Sequence[int] | Tensor,
        cost: SequenceCost | None = None,
    ) -> Imbalance:
        """Reads what the samplers of all ranks yield; steps that some rank lacks are left out.

        Args:
            batches: for each rank, its batches of indices.
            lengths: tokens of each sample.
            cost: of a sequence; default: its tokens.
        """
        of_sample = (cost or SequenceCost())(torch.as_tensor(lengths)).tolist()
        rows = zip(*batches, strict=False)
        costs = [[sum(of_sample[i] for i in each) for each in row] for row in rows]
        return cls.of_costs(torch.tensor(costs, dtype=torch.float64))
