"""What a balanced batch sampler is checked for, in one call each, as the planted faults need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padless import BalancedBatchSampler, Imbalance, SequenceCost

Batches = list[list[int]]
# An 8B LLaMA with 128k words, as `SequenceCost.from_config` counts it.
COST_8B = SequenceCost(4.5e10, 9.2e5)


def lognormal(samples: int, longest: int, *, seed: int, sigma: float = 1.0) -> Tensor:
    """Draws lengths as chat and instruction sets have them: a median of 400, and a long tail."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(samples).log_normal_(6.0, sigma, generator=generator)
    return drawn.long().clamp(1, longest)


def of_all_ranks(
    lengths: Any, max_tokens: int, num_replicas: int, *, epoch: int = 0, **options: Any
) -> list[Batches]:
    """Draws an epoch of every rank."""
    made = []
    for rank in range(num_replicas):
        sampler = BalancedBatchSampler(
            lengths, max_tokens, num_replicas=num_replicas, rank=rank, **options
        )
        sampler.set_epoch(epoch)
        made.append(list(sampler))
        assert len(made[-1]) == len(sampler), "len is not the number of batches"
    return made


def check_exactly_once(lengths: list[int], max_tokens: int, num_replicas: int, epoch: int) -> None:
    """Every sample once over all ranks; where batches outnumber samples, every sample at least."""
    ranks = of_all_ranks(lengths, max_tokens, num_replicas, epoch=epoch)
    seen = sorted(index for batches in ranks for batch in batches for index in batch)
    if sum(len(batches) for batches in ranks) <= len(lengths):
        assert seen == list(range(len(lengths))), "a sample is missing, or comes twice"
    else:
        assert sorted(set(seen)) == list(range(len(lengths))), "a sample is missing"


def check_same_steps(lengths: list[int], max_tokens: int, num_replicas: int, epoch: int) -> None:
    """As many batches on every rank and in every epoch, none of them empty."""
    counts = {
        len(batches)
        for each in (0, epoch)
        for batches in of_all_ranks(lengths, max_tokens, num_replicas, epoch=each)
    }
    assert len(counts) == 1, f"ranks or epochs have different numbers of batches: {counts}"
    ranks = of_all_ranks(lengths, max_tokens, num_replicas, epoch=epoch)
    assert all(batch for batches in ranks for batch in batches), "a batch is empty"


def check_budget(lengths: list[int], max_tokens: int, num_replicas: int, epoch: int) -> None:
    """No batch above its tokens."""
    for batches in of_all_ranks(lengths, max_tokens, num_replicas, epoch=epoch):
        for batch in batches:
            assert sum(lengths[i] for i in batch) <= max_tokens, "a batch is over its budget"


def check_determinism(lengths: list[int], max_tokens: int, num_replicas: int, epoch: int) -> None:
    """The same epoch again, whatever was drawn before."""
    torch.manual_seed(1)
    first = of_all_ranks(lengths, max_tokens, num_replicas, epoch=epoch)
    torch.manual_seed(2)
    assert of_all_ranks(lengths, max_tokens, num_replicas, epoch=epoch) == first, "another epoch"


def check_resume(lengths: list[int], max_tokens: int, num_replicas: int, epoch: int) -> None:
    """A state taken behind any batch gives the rest of the epoch, and the whole next one."""
    make: Callable[[], BalancedBatchSampler] = lambda: BalancedBatchSampler(  # noqa: E731
        lengths, max_tokens, num_replicas=num_replicas, rank=num_replicas - 1
    )
    sampler = make()
    sampler.set_epoch(epoch)
    whole, states = [], [sampler.state_dict()]
    for batch in sampler:
        whole.append(batch)
        states.append(sampler.state_dict())
    sampler.set_epoch(epoch + 1)
    following = list(sampler)
    for done in {0, 1, len(whole) // 2, len(whole) - 1, len(whole)}:
        again = make()
        again.load_state_dict(states[done])
        # As a training loop says at the head of each epoch.
        again.set_epoch(epoch)
        assert list(again) == whole[done:], f"another rest behind {done} batches"
        again.set_epoch(epoch + 1)
        assert list(again) == following, "the epoch after a resumed one is not whole"


def check_balance(seed: int) -> None:
    """8 ranks on lognormal lengths: at most 1.05 over an epoch; without balance it is above."""
    lengths = lognormal(4000, 8192, seed=seed)
    ranks = of_all_ranks(lengths, 16384, 8, cost=COST_8B, epoch=seed)
    found = Imbalance.of_batches(ranks, lengths, COST_8B)
    assert found.epoch <= 1.05, f"imbalance {found}"
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))
    fixed = [shuffled[rank::8].split(24) for rank in range(8)]
    plain = Imbalance.of_batches([[b.tolist() for b in f] for f in fixed], lengths, COST_8B)
    assert plain.epoch > 1.2, f"the set does not show imbalance: {plain}"


CHECKS = (
    check_exactly_once, check_same_steps, check_budget, check_determinism, check_resume,
)  # fmt: skip
