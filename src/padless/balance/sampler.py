"""`BalancedBatchSampler`: the batches of each rank, by seed and epoch, from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from padless.balance.cost import SequenceCost
from padless.balance.imbalance import Imbalance
from padless.balance.plan import count_batches, deal

_STATE = ("seed", "epoch", "step")


class BalancedBatchSampler(Sampler[list[int]]):
    """Fills batches up to a token budget, with the same cost on every rank in each step.

    For a `DataLoader(dataset, batch_sampler=...)`. Every rank plans the same epoch by itself and
    takes its part, so nothing is communicated. All ranks have the same number of batches, which is
    the same in every epoch, and each sample comes exactly once an epoch, unless there are fewer
    samples than batches (see `drop_last`).

    Args:
        lengths: real tokens of each sample, `(samples,)`.
        max_tokens: real tokens that a batch may have; it bounds memory.
        cost: of a sequence; default: its tokens. `SequenceCost.from_config(model.config)` counts
            attention too.
        num_replicas: ranks that take different batches; default: the size of the process group.
        rank: of this process; default: its rank in the process group. "all" yields the batches of
            all ranks in turn, for `accelerate`, which deals them out itself.
        shuffle: plan another epoch for each `set_epoch`; or always the same.
        seed: the same on every rank.
        drop_last: matters only where long samples need batches of their own and their number is
            not a multiple of `num_replicas`. True leaves out the incomplete step; False fills it up
            with the shortest samples again.

    Raises:
        TypeError: lengths are not integers.
        ValueError: an argument is out of its range, or a sample is longer than max_tokens.

    Note:
        In each step costs are as near to each other as the lengths allow: batches are dealt out by
        cost, and those that a long sample makes expensive share a step. Ranks change places.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        max_tokens: int,
        *,
        cost: SequenceCost | None = None,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.lengths = _checked(lengths, max_tokens)
        self.max_tokens = max_tokens
        self.cost = cost or SequenceCost()
        has_group = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if has_group else 1
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be 1 or more, got {num_replicas}")
        if rank is None:
            rank = dist.get_rank() if has_group else 0
        if rank != "all" and not (isinstance(rank, int) and 0 <= rank < num_replicas):
            raise ValueError(f'rank must be "all" or 0 to {num_replicas - 1}, got {rank!r}')
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._first = 0  # where the next `iter` begins
        self._step = 0  # of the next batch
        self._costs = self.cost(self.lengths)
        self._num_batches = count_batches(self.lengths, self._costs, max_tokens, num_replicas)
        self._steps = self._num_batches // num_replicas
        if drop_last:
            self._steps = min(self._steps, len(self.lengths) // num_replicas)
        if self._steps == 0:
            raise ValueError(
                f"lengths must hold a sample for each of {num_replicas} ranks with drop_last=True, "
                f"got {len(self.lengths)}; pass drop_last=False to repeat some"
            )

    @property
    def sampler(self) -> BalancedBatchSampler:
        """Itself: accelerate hands the epoch to the `sampler` of a batch sampler."""
        return self

    def __len__(self) -> int:
        """Batches of a whole epoch that `iter` yields, wherever it begins."""
        return self._steps * (self.num_replicas if self.rank == "all" else 1)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; another one than before begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._first, self._step = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Says where the epoch is: `seed`, `epoch` and `step`, that of the next batch.

        Note:
            A DataLoader with workers draws batches ahead of the training loop. Put the number of
            steps that were trained on in place of `step` then.
        """
        return {"seed": self.seed, "epoch": self.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a `state_dict` was taken: the next `iter` yields the rest of that epoch.

        Raises:
            ValueError: the state lacks something, or is of another seed or beyond the epoch.
        """
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise ValueError(f"state must have {', '.join(_STATE)}, got none of {missing}")
        if state["seed"] != self.seed:
            raise ValueError(
                f"state must be of this sampler's seed {self.seed}, got {state['seed']}; "
                f"build the sampler with the same arguments"
            )
        if not 0 <= state["step"] <= self._steps:
            raise ValueError(
                f"step must be 0 to {self._steps}, got {state['step']}; "
                f"build the sampler with the same lengths, max_tokens and num_replicas"
            )
        self.epoch = state["epoch"]
        self._first = self._step = state["step"]

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of each batch, from the step of the last `load_state_dict` on."""
        samples, ends, order = self._plan()
        first, self._first = self._first, 0
        ranks = range(self.num_replicas) if self.rank == "all" else (self.rank,)
        for step in range(first, self._steps):
            # Before the batch is handed out: a state is taken while the loop works on it.
            self._step = step + 1
            for rank in ranks:
                batch = order[step][rank]
                yield samples[ends[batch] : ends[batch + 1]].tolist()
        self._step = 0

    def imbalance(self) -> Imbalance:
        """Says how far the ranks are apart in this epoch, by the sampler's own cost."""
        samples, ends, order = self._plan()
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), self._costs[samples].cumsum(0)])
        costs = sums[ends].diff()
        return Imbalance.of_costs(costs[torch.tensor(order)])

    def _plan(self) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Plans the epoch, the same on every rank.

        Returns:
            Samples, batch after batch; where each batch ends, from 0 on; and the batch of each rank
            in each step.
        """
        generator = torch.Generator()
        # Mixed, so that an epoch of one seed is not the next one of its neighbour.
        generator.manual_seed((self.seed * 1_000_003 + self.epoch * self.shuffle) % 2**63)
        count = self._num_batches
        batch_of = deal(self.lengths, self._costs, self.max_tokens, count, generator)
        samples = batch_of.argsort(stable=True)
        sizes = batch_of.bincount(minlength=count)
        spent = torch.zeros(count, dtype=torch.float64).index_add_(0, batch_of, self._costs)
        by_cost = spent.argsort(descending=True, stable=True)[: self._steps * self.num_replicas]
        empty = by_cost[sizes[by_cost] == 0]
        if len(empty):
            # More batches than samples: the shortest come again, in batches of their own.
            shortest = self.lengths.argsort(stable=True)
            again = shortest[torch.arange(len(empty)) % len(shortest)]
            batch_of = torch.cat([batch_of, empty])
            samples = torch.cat([torch.arange(len(self.lengths)), again])
            samples = samples[batch_of.argsort(stable=True)]
            sizes = batch_of.bincount(minlength=count)
        steps = by_cost.view(self._steps, self.num_replicas)
        steps = steps[torch.randperm(self._steps, generator=generator)]
        places = torch.rand(steps.shape, generator=generator).argsort(1)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        return samples, ends, steps.gather(1, places).tolist()


def _checked(lengths: Sequence[int] | Tensor, max_tokens: int) -> Tensor:
    made = torch.as_tensor(lengths).cpu()
    if made.numel() and (made.is_floating_point() or made.dtype == torch.bool):
        raise TypeError(f"lengths must be integers, got {made.dtype}")
    if made.dim() != 1 or made.numel() == 0:
        raise ValueError(
            f"lengths must have shape (samples,), at least one, got {tuple(made.shape)}"
        )
    made = made.to(torch.int64)
    shortest, longest = int(made.min()), int(made.max())
    if shortest < 1:
        at = int(made.argmin())
        raise ValueError(f"lengths must be 1 or more, got {shortest} at index {at}")
    if longest > max_tokens:
        at = int(made.argmax())
        raise ValueError(
            f"max_tokens must hold the longest sample, got {max_tokens} and a sample of {longest} "
            f"tokens at index {at}; raise it or cut the sample"
        )
    return made
