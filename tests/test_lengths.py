"""`lengths_report` against brute force: every shuffle of small data sets, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import padless
from padless import lengths_report
from padless.lengths.packing import packed_rows

small = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def _grouped(order: list[int], batch_size: int) -> list[int]:
    """Sorts within groups of batches, as transformers' `get_length_grouped_indices` does."""
    group = batch_size * (min(len(order) // (batch_size * 4), 50) or 1)
    cut = [order[at : at + group] for at in range(0, len(order), group)]
    return [length for part in cut for length in sorted(part, reverse=True)]


def _padded(order: list[int], batch_size: int, multiple: int) -> tuple[int, int]:
    slots = pairs = 0
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        seqlen = -(-max(batch) // multiple) * multiple
        slots += len(batch) * seqlen
        pairs += len(batch) * seqlen**2
    return slots, pairs


@settings(deadline=None, max_examples=60)
@given(small, st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_padding_is_the_mean_over_all_shuffles(
    lengths: list[int], batch_size: int, multiple: int, grouped: bool
) -> None:
    found = [
        _padded(_grouped(list(order), batch_size) if grouped else list(order), batch_size, multiple)
        for order in itertools.permutations(lengths)
    ]
    report = lengths_report(
        lengths, batch_size, pad_to_multiple_of=multiple, group_by_length=grouped
    )
    slots, pairs = (sum(each) / len(found) for each in zip(*found, strict=True))
    assert report.padded_tokens == pytest.approx(slots, rel=1e-9)
    assert report.padded_pairs == pytest.approx(pairs, rel=1e-9)
    assert report.tokens == sum(lengths)
    assert report.attention_pairs == sum(n * n for n in lengths)


@pytest.mark.parametrize("grouped", [False, True], ids=["shuffled", "grouped"])
def test_padding_agrees_with_many_shuffles_of_a_larger_set(grouped: bool) -> None:
    # Groups of several batches and a last one that is not full, which six examples do not have.
    lengths = (torch.randn(203).mul(0.8).add(4).exp().long() + 1).tolist()
    report = lengths_report(lengths, 8, group_by_length=grouped)
    found = []
    for _ in range(2000):
        order = [lengths[i] for i in torch.randperm(len(lengths)).tolist()]
        found.append(_padded(_grouped(order, 8) if grouped else order, 8, 1))
    sampled = torch.tensor(found, dtype=torch.float64)
    mean, error = sampled.mean(0), sampled.std(0) / len(found) ** 0.5
    got = torch.tensor([report.padded_tokens, report.padded_pairs], dtype=torch.float64)
    assert ((got - mean).abs() < 4 * error).all()


def test_grouping_is_what_transformers_does() -> None:
    pt = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = (torch.randn(90).mul(0.8).add(4).exp().long() + 1).tolist()
    indices = pt.get_length_grouped_indices(lengths, 4, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3)).tolist()
    want = _grouped([lengths[i] for i in order], 4)
    got = [lengths[i] for i in indices]
    # All but the longest example's exchange with the first.
    assert sum(a != b for a, b in zip(got, want, strict=True)) <= 2


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 25))
def test_packing_is_best_fit_decreasing(lengths: list[int], spare: int) -> None:
    max_length = max(lengths) + spare
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, left in enumerate(rows) if left >= length]
        if fitting:
            rows[min(fitting, key=lambda at: rows[at])] -= length
        else:
            rows.append(max_length - length)
    assert packed_rows(torch.tensor(lengths), max_length) == len(rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=80))
def test_histogram_and_percentiles_hold_every_example(lengths: list[int]) -> None:
    report = lengths_report(lengths)
    assert 1 <= len(report.histogram) <= 12
    for first, last, count in report.histogram:
        assert count == sum(first <= n <= last for n in lengths)
    assert sum(count for _, _, count in report.histogram) == len(lengths)
    assert (report.shortest, report.longest) == (min(lengths), max(lengths))
    for percent, value in report.percentiles.items():
        # Nearest rank: the smallest that so many are at most.
        assert sum(n <= value for n in lengths) >= percent / 100 * len(lengths)
        assert sum(n < value for n in lengths) < percent / 100 * len(lengths)


def test_cutting_and_packing() -> None:
    report = lengths_report([3, 9, 12, 4], 2, max_length=10)
    assert (report.truncated_examples, report.tokens, report.longest) == (1, 26, 10)
    assert (report.packed_rows, report.packed_tokens) == (3, 30)
    assert lengths_report([3, 9]).packed_tokens is None


def test_gains_are_the_ratios() -> None:
    report = lengths_report([1, 3], 2)
    assert report.padded_tokens == pytest.approx(6)
    assert report.padding_share == pytest.approx(1 / 3)
    assert report.token_speedup == pytest.approx(6 / 4)
    assert report.attention_speedup == pytest.approx(18 / 10)
    assert report.speedup_ceiling == pytest.approx(1.8)


class _MapStyle:
    """As `torch.utils.data.Dataset`: a length and items, and no end to the items."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.zeros(index + 2, dtype=torch.int64)}


def _datasets() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 2, 3]], "text": ["a", "b"]})


def _datasets_with_length() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"length": [2, 3], "text": ["a", "b"]})


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: [2, 3], id="lengths"),
        pytest.param(lambda: torch.tensor([2, 3]), id="tensor"),
        pytest.param(lambda: torch.tensor([2, 3]).numpy(), id="array"),
        pytest.param(lambda: list(torch.tensor([2, 3])), id="scalars"),
        pytest.param(lambda: iter([2, 3]), id="iterator"),
        pytest.param(lambda: [[7, 7], [7, 7, 7]], id="ids"),
        pytest.param(lambda: [torch.ones(1, 2), torch.ones(1, 3)], id="rows"),
        pytest.param(lambda: [{"input_ids": [7, 7]}, {"input_ids": [7, 7, 7]}], id="examples"),
        pytest.param(lambda: [{"length": 2}, {"length": 3}], id="with-length"),
        pytest.param(
            lambda: [
                {"input_ids": [0, 0, 7, 7], "attention_mask": [0, 0, 1, 1]},
                {"input_ids": [0, 7, 7, 7], "attention_mask": [0, 1, 1, 1]},
            ],
            id="padded-already",
        ),
        pytest.param(lambda: {"input_ids": [[7, 7], [7, 7, 7]]}, id="tokenizer"),
        pytest.param(_MapStyle, id="map-style"),
        pytest.param(_datasets, id="datasets"),
        pytest.param(_datasets_with_length, id="datasets-length"),
    ],
)
def test_lengths_are_read_from(make: Callable[[], Any]) -> None:
    report = lengths_report(make())
    assert (report.examples, report.shortest, report.longest) == (2, 2, 3)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "dataset must hold at least one example, got none"),
        ([4, -2], ValueError, "lengths must be 1 or more, got -2 for example 1; leave such"),
        ([[1], []], ValueError, "lengths must be 1 or more, got 0 for example 1; leave such"),
        ([4, 2.5], TypeError, r"lengths must be whole numbers, got 2\.5 for example 1"),
        ([True], TypeError, "lengths must be whole numbers, got True for example 0"),
        ([{"length": "9"}], TypeError, "lengths must be whole numbers, got '9' for example 0"),
        ([{"input_ids": 3}], TypeError, "input_ids must be token ids, got int for example 0"),
        (["a text"], TypeError, "examples must be token ids, got text for example 0; tokenise it"),
        ("a text", TypeError, "dataset must be lengths or tokenised examples, got str"),
        (3, TypeError, "dataset must be lengths or tokenised examples, got int"),
        ([{"text": "a"}], ValueError, "example 0 must have one of length, .*, got text; tokenise"),
        ({"text": ["a"]}, ValueError, "dataset must have one of length, .*, got text; tokenise"),
    ],
)
def test_data_without_lengths_is_refused(dataset: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        lengths_report(dataset)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "pad_to_multiple_of"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be 1 or more, got 0"),
        (-8, ValueError, "must be 1 or more, got -8"),
        (2.0, TypeError, r"must be a whole number, got 2\.0"),
        (True, TypeError, "must be a whole number, got True"),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"{name} {message}"):
        lengths_report([1, 2], **{name: value})


SHOWN = """\
6 examples, 1 of them cut at 2,000, 2,150 tokens
10 to 2,000 tokens each, mean 358.3
percentiles: 5 % 10, 25 % 20, 50 % 30, 75 % 50, 95 % 2,000, 99 % 2,000

        length   examples
 ───────────────────────────────────────────────────────────
       1 - 200          5   ████████████████████████████████
     201 - 400          0
     401 - 600          0
     601 - 800          0
   801 - 1,000          0
 1,001 - 1,200          0
 1,201 - 1,400          0
 1,401 - 1,600          0
 1,601 - 1,800          0
 1,801 - 2,000          1   ██████▍


 an epoch computes   tokens   of them real
 ──────────────────────────────────────────────────────────────────────────────
 with padding         6,146          35.0%   batches of 3, shuffled, to
                                             multiples of 8
 packed to rows       4,000          53.8%   2 rows of 2,000
 real tokens only     2,150         100.0%   padless

 most it can gain    2.86 x                  all but attention
                     3.00 x                  attention's products"""


def test_print_shows_it_in_80_columns() -> None:
    report = lengths_report([10, 20, 30, 40, 50, 2500], 3, max_length=2000, pad_to_multiple_of=8)
    assert str(report) == SHOWN
    largest = lengths_report([10**6, 10**7], 256, max_length=10**7, group_by_length=True)
    assert max(map(len, str(largest).splitlines())) <= 80


def test_report_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        lengths_report([1]).tokens = 2  # type: ignore[misc]


def test_plot_draws_the_histogram(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = lengths_report([1, 5, 9], 3)
    report.plot(tmp_path / "lengths.svg")
    drawn = (tmp_path / "lengths.svg").read_text(encoding="utf-8")
    assert "44% of the padded batches is padding" in drawn  # matplotlib writes texts as comments


def test_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padless.lengths.draw.import_optional", lambda name: (None, "not there"))
    with pytest.raises(ImportError, match=r"plot needs matplotlib; run `pip install 'padless\[pl"):
        lengths_report([1]).plot(tmp_path / "lengths.png")


def test_report_is_public() -> None:
    assert isinstance(lengths_report([1]), padless.LengthsReport)
