"""Deals samples out to batches: equal costs, each under the token budget, every sample once."""

from __future__ import annotations

import torch
from torch import Tensor

# Samples whose lengths differ by less than this share change places from epoch to epoch. Wider
# shuffles better, and leaves larger pieces for the end, where they no longer even out.
_SHUFFLED_SHARE = 0.25


def count_batches(lengths: Tensor, costs: Tensor, max_tokens: int, multiple_of: int) -> int:
    """Finds a number of batches that all samples fit into, near the smallest one.

    Args:
        lengths: int64 `(samples,)`, none above `max_tokens`.
        costs: float64 `(samples,)`, which grow with the lengths.
        max_tokens: of a batch.
        multiple_of: of which the number has to be a multiple.

    Note:
        Depends on lengths alone, and `deal` succeeds with it for every seed.
    """
    alone = int((lengths > max_tokens // 2).sum())  # no two of these share a batch
    steps = -(-max(alone, -(-int(lengths.sum()) // max_tokens)) // multiple_of)
    order = lengths.argsort(descending=True, stable=True)
    while True:
        _, dealt = _deal(lengths, costs, order, max_tokens, steps * multiple_of)
        if dealt == len(order):
            return steps * multiple_of
        left = int(lengths[order[dealt:]].sum()) // (max_tokens * multiple_of)
        steps += max(1, steps // 100, left)


def deal(
    lengths: Tensor, costs: Tensor, max_tokens: int, num_batches: int, generator: torch.Generator
) -> Tensor:
    """Deals samples out to batches.

    Args:
        lengths: int64 `(samples,)`.
        costs: float64 `(samples,)`.
        max_tokens: of a batch.
        num_batches: from `count_batches`.
        generator: of the epoch.

    Returns:
        int64 `(samples,)`, the batch of each. A batch is empty only if there are fewer samples than
        batches.
    """
    shuffled = torch.randperm(len(lengths), generator=generator)
    noise = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    share = _SHUFFLED_SHARE
    while True:
        keys = lengths[shuffled] * (1 + share * noise)
        order = shuffled[keys.argsort(descending=True, stable=True)]
        batch_of, dealt = _deal(lengths, costs, order, max_tokens, num_batches)
        if dealt == len(order):
            return batch_of
        # At 0 the lengths come in the order in which `count_batches` saw them fit.
        share = share / 2 if share > _SHUFFLED_SHARE / 8 else 0.0


def _deal(
    lengths: Tensor, costs: Tensor, order: Tensor, max_tokens: int, num_batches: int
) -> tuple[Tensor, int]:
    """Gives the largest sample to the cheapest batch, a round at a time.

    A round serves the cheaper half of the batches only, so that one with an expensive sample waits
    until the others have caught up with it.

    Returns:
        The batch of each sample, and how many samples of the order found one.
    """
    batch_of = torch.empty_like(order)
    tokens = torch.zeros(num_batches, dtype=torch.int64)
    spent = torch.zeros(num_batches, dtype=torch.float64)
    sizes, prices = lengths[order], costs[order]
    first, half = 0, max(1, num_batches // 2)
    while first < len(order):
        count = min(half, len(order) - first)
        longest = int(sizes[first : first + count].max())
        room = (tokens <= max_tokens - longest).nonzero().squeeze(1)
        if len(room) == 0:
            # There may be for the next sample, if it is not the longest of its round.
            count = 1
            room = (tokens <= max_tokens - sizes[first]).nonzero().squeeze(1)
            if len(room) == 0:
                break
        cheapest = room[spent[room].argsort(stable=True)[:count]]
        count = len(cheapest)
        dealt = slice(first, first + count)
        # Noise in the order: within the round the most expensive one goes to the cheapest batch.
        ranked = prices[dealt].argsort(descending=True, stable=True) + first
        batch_of[order[ranked]] = cheapest
        tokens[cheapest] += sizes[ranked]
        spent[cheapest] += prices[ranked]
        first += count
    return batch_of, first
