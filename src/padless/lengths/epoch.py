"""What an epoch of shuffled batches computes, by expectation and not by sampling.

A batch of a shuffled data set is a uniformly random part of it, so how long its longest row is
follows from the order statistics of the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# transformers' LengthGroupedSampler sorts within so many batches, or a quarter of the data set.
_MOST_GROUPED = 50
_GROUPED_SHARE = 4


def expected_padded(
    lengths: Tensor, batch_size: int, *, pad_to_multiple_of: int = 1, group_by_length: bool = False
) -> tuple[float, float]:
    """Computes what the padded batches of one epoch hold, on average over all shuffles.

    Args:
        lengths: int64 `(examples,)`.
        batch_size: examples a batch; the last one of an epoch may be smaller.
        pad_to_multiple_of: rows are padded on to a multiple of so many tokens.
        group_by_length: batches as transformers' `LengthGroupedSampler` makes them, but for the
            longest example, which it moves into the first batch.

    Returns:
        Expected slots, `rows x seqlen`, and expected pairs of slots that attention compares,
        `rows x seqlen^2`, each summed over the epoch.
    """
    rows = -(-lengths // pad_to_multiple_of) * pad_to_multiple_of
    values, counts = torch.unique(rows, return_counts=True)  # ascending
    at_most = torch.cumsum(counts, 0)
    values = values.double()
    group = batch_size
    if group_by_length:
        group *= min(len(rows) // (batch_size * _GROUPED_SHARE), _MOST_GROUPED) or 1
    groups, rest = divmod(len(rows), group)
    slots = pairs = 0.0
    for times, sample in ((groups, group), (1, rest)):
        if not times:
            continue
        # A group is sorted from the longest on and cut: each batch's first is its longest.
        for first, chance in enumerate(_chances(at_most, sample)):
            if first % batch_size == 0:
                size = times * min(batch_size, sample - first)
                slots += size * float(chance @ values)
                pairs += size * float(chance @ values**2)
    return slots, pairs


def _chances(at_most: Tensor, sample: int) -> Iterator[Tensor]:
    """Computes how likely each value is to be an order statistic of a sample without replacement.

    The one with `first` larger ones in front of it is at most v if no more than `first` of the
    sample are above v, which the hypergeometric distribution tells.

    Args:
        at_most: int64 `(values,)`, how many examples are at most each value, ascending.
        sample: examples drawn.

    Yields:
        float64 `(values,)`, for `first` = 0 (the largest), 1, ..., sample - 1.
    """
    examples = int(at_most[-1])
    log_factorial = torch.lgamma(torch.arange(1, examples + 2, dtype=torch.float64))

    def log_choose(n: Tensor, k: int) -> Tensor:
        known = log_factorial[n] - log_factorial[k] - log_factorial[(n - k).clamp(min=0)]
        return torch.where(n >= k, known, -torch.inf)  # impossible choices weigh nothing

    whole = log_choose(at_most[-1], sample)
    below = torch.zeros(len(at_most), dtype=torch.float64)
    for above in range(sample):
        below += torch.exp(
            log_choose(at_most, sample - above) + log_choose(examples - at_most, above) - whole
        )
        yield torch.diff(below, prepend=below.new_zeros(1))
