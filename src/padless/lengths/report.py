"""How much a data set gains from its padding not being computed, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from padless.lengths.draw import plot, render, table
from padless.lengths.epoch import expected_padded
from padless.lengths.packing import packed_rows
from padless.lengths.read import read_lengths

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_MOST_BINS = 12


@dataclass(frozen=True)
class LengthsReport:
    """Lengths of a data set, and what an epoch of it computes with and without padding.

    Attributes:
        examples: how many.
        batch_size: examples a batch.
        max_length: tokens at which examples are cut; None: they are not.
        pad_to_multiple_of: rows are padded on to a multiple of so many tokens.
        group_by_length: whether batches hold examples of like lengths.
        truncated_examples: how many were cut.
        tokens: real ones of an epoch, after cutting: what is computed without padding.
        shortest: tokens of the shortest example.
        longest: tokens of the longest example, after cutting.
        mean: tokens of an example, on average.
        percentiles: tokens by percentile, nearest rank.
        padded_tokens: tokens of an epoch with padding, expected over all shuffles.
        packed_rows: rows of `max_length` that an epoch packs into, best fit first and none cut
            further; None without a max_length.
        attention_pairs: pairs of tokens that attention compares within examples, both ways.
        padded_pairs: the same with padding, expected over all shuffles.
        histogram: (first length, last length, examples) of each bin, in ascending order.
    """

    examples: int
    batch_size: int
    max_length: int | None
    pad_to_multiple_of: int
    group_by_length: bool
    truncated_examples: int
    tokens: int
    shortest: int
    longest: int
    mean: float
    percentiles: dict[int, int]
    padded_tokens: float
    packed_rows: int | None
    attention_pairs: int
    padded_pairs: float
    histogram: tuple[tuple[int, int, int], ...]

    @property
    def padding_share(self) -> float:
        """Share of the padded batches' tokens that is padding, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens

    @property
    def packed_tokens(self) -> int | None:
        """Tokens of an epoch in rows packed to `max_length`, filled up; None without it."""
        return None if self.packed_rows is None else self.packed_rows * (self.max_length or 0)

    @property
    def token_speedup(self) -> float:
        """Padded over real tokens: the most that all but attention can gain."""
        return self.padded_tokens / self.tokens

    @property
    def attention_speedup(self) -> float:
        """Padded over real pairs: the most that attention's products can gain."""
        return self.padded_pairs / self.attention_pairs

    @property
    def speedup_ceiling(self) -> float:
        """The larger of both: no step that is bound by arithmetic gains more."""
        return max(self.token_speedup, self.attention_speedup)

    def __str__(self) -> str:
        return render(self, width=80)

    def __rich__(self) -> Table:
        return table(self)

    def plot(self, path: str | Path) -> None:
        """Draws the histogram, with the mean length and that of padded rows, into a file.

        Args:
            path: its ending names the format, as matplotlib knows it: .png, .svg, .pdf.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plot(self, Path(path))


def lengths_report(
    dataset: Any,
    batch_size: int = 8,
    *,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    group_by_length: bool = False,
) -> LengthsReport:
    """Tells from token lengths alone how much of a data set's batches is padding.

    What padded batches compute is the exact expectation over all shuffles, from the order
    statistics of the lengths: nothing is sampled, and there is no seed.

    Args:
        dataset: lengths; or tokenised examples, as mappings with `length`, `attention_mask` or
            `input_ids`, or as sequences of token ids; or columns of these names, as in a
            `datasets.Dataset` and in what a tokenizer returns. Tokens at 0 in an attention_mask
            count as padding.
        batch_size: examples a batch, as the model sees it: of one device and one step of
            accumulation. An epoch's last batch may be smaller.
        max_length: cut examples to so many tokens, and pack to it; default: do not.
        pad_to_multiple_of: pad rows on to a multiple of so many tokens; default: do not.
        group_by_length: batches as `Trainer`'s `group_by_length` makes them. The longest example,
            which it moves into the first batch, is left where it is.

    Returns:
        The report; `print` shows it in 80 columns, `plot` draws it.

    Raises:
        TypeError: something is no length and no tokenised example, or an option is no whole number.
        ValueError: there is no example, a length or an option is below 1, or no column is known.
    """
    pad_to_multiple_of = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    options = {"batch_size": batch_size, "pad_to_multiple_of": pad_to_multiple_of}
    if max_length is not None:
        options["max_length"] = max_length
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    given = read_lengths(dataset)
    lengths = given if max_length is None else given.clamp(max=max_length)
    slots, pairs = expected_padded(
        lengths,
        batch_size,
        pad_to_multiple_of=pad_to_multiple_of,
        group_by_length=group_by_length,
    )
    ordered = lengths.sort().values
    return LengthsReport(
        examples=len(lengths),
        batch_size=batch_size,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        group_by_length=group_by_length,
        truncated_examples=int((given > lengths).sum()),
        tokens=int(lengths.sum()),
        shortest=int(ordered[0]),
        longest=int(ordered[-1]),
        mean=float(lengths.double().mean()),
        percentiles={p: int(ordered[-(-p * len(ordered) // 100) - 1]) for p in _PERCENTILES},
        padded_tokens=slots,
        packed_rows=None if max_length is None else packed_rows(lengths, max_length),
        attention_pairs=int((lengths**2).sum()),
        padded_pairs=pairs,
        histogram=_histogram(ordered),
    )


def _histogram(ordered: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Counts lengths in at most 12 bins of equal width, a round number, from the shortest on."""
    shortest, longest = int(ordered[0]), int(ordered[-1])
    width = _round_up((longest - shortest) // _MOST_BINS + 1)
    first = (shortest - 1) // width * width + 1
    if (longest - first) // width >= _MOST_BINS:
        width = _round_up(width + 1)
        first = (shortest - 1) // width * width + 1
    bins = torch.bincount((ordered - first) // width)
    return tuple(
        (first + n * width, first + (n + 1) * width - 1, count)
        for n, count in enumerate(bins.tolist())
    )


def _round_up(width: int) -> int:
    """Returns the next 1, 2 or 5 times a power of ten."""
    power = 10 ** (len(str(width)) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)
