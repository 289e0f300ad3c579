"""Who holds which tokens: every token once, tokens and work in equal shares, and what sees what."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padless.parallel.blocks import local_lengths, visible_blocks
from padless.parallel.split import SequenceSplit, split_balanced, split_evenly

documents = st.lists(st.integers(0, 40), min_size=1, max_size=12)
SPLITS = pytest.mark.parametrize("split", [split_evenly, split_balanced])


def _places(split: SequenceSplit, rank: int) -> list[int]:
    return [place for start, stop in split.ranges(rank) for place in range(start, stop)]


@SPLITS
@settings(max_examples=150, deadline=None)
@given(lengths=documents, ranks=st.integers(1, 9))
def test_every_token_once_and_totals_equal(split, lengths: list[int], ranks: int) -> None:
    made = split(lengths, ranks)
    held = [_places(made, rank) for rank in range(ranks)]
    assert sorted(chain.from_iterable(held)) == list(range(sum(lengths)))
    assert tuple(map(len, held)) == made.totals
    assert max(made.totals) - min(made.totals) <= 1


@settings(max_examples=150, deadline=None)
@given(lengths=documents, ranks=st.integers(1, 9))
def test_shared_pieces_are_a_prefix_and_documents_stay_together(
    lengths: list[int], ranks: int
) -> None:
    made = split_balanced(lengths, ranks)
    for rank, own in enumerate(made.pieces):
        shared = made.shared(rank)
        assert own[: len(shared)] == shared
        numbers = [piece.document for piece in own]
        met = list(dict.fromkeys(numbers))
        assert numbers == sorted(numbers, key=met.index)
        for a, b in pairwise(own):
            assert a.document != b.document or a.stop < b.start


@settings(max_examples=150, deadline=None)
@given(lengths=documents, ranks=st.integers(1, 6), causal=st.booleans())
def test_blocks_are_what_a_rank_sees_of_the_others(
    lengths: list[int], ranks: int, causal: bool
) -> None:
    made = split_balanced(lengths, ranks)
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    held = [_places(made, rank) for rank in range(ranks)]
    for rank in range(ranks):
        assert sum(local_lengths(made, rank)) == len(held[rank])
        for source in range(ranks):
            if source == rank:
                continue
            seen = set()
            blocks = visible_blocks(made, rank, source, causal=causal)
            # One call of a kernel for each step.
            assert len(blocks) <= 1
            for block in blocks:
                for queries, keys in zip(block.queries, block.keys, strict=True):
                    pairs = {(q, k) for q in range(*queries) for k in range(*keys)}
                    assert pairs and not pairs & seen
                    seen |= pairs
            found = {(held[rank][q], held[source][k]) for q, k in seen}
            expected = {
                (q, k)
                for q in held[rank]
                for k in held[source]
                if document[q] == document[k] and (k < q or not causal)
            }
            assert found == expected


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("total", "mean"), [(65536, 65536), (65536, 2048), (32768, 500), (131072, 8192), (16384, 1500)]
)
def test_usual_batches_are_balanced(ranks: int, total: int, mean: int) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        lengths: list[int] = []
        while (rest := total - sum(lengths)) > 0:
            lengths.append(min(rest, rng.randint(mean // 8, 2 * mean) if mean < total else rest))
        made = split_balanced(lengths, ranks)
        assert made.imbalance <= 1.05
        costs = [sum(p.cost for p in own) for own in made.pieces]
        assert sum(costs) == sum(n * (n + 1) // 2 for n in lengths)


def test_short_documents_stay_whole() -> None:
    # Nothing of them has to travel, but for the few that make totals equal.
    made = split_balanced([200] * 64, 4)
    assert _shared(made) == 0


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mean", [500, 2048, 8192])
def test_documents_far_below_a_share_travel_hardly(ranks: int, mean: int) -> None:
    # However long they are: what counts is that they can be dealt out whole.
    for seed in range(5):
        rng = random.Random(seed)
        lengths = [rng.randint(mean // 8, 2 * mean) for _ in range(24 * ranks)]
        made = split_balanced(lengths, ranks)
        assert made.imbalance <= 1.05
        assert _shared(made) <= 0.15 * sum(lengths)


def test_long_document_is_cut_and_short_ones_beside_it_are_not() -> None:
    lengths = [30000, *[500] * 30]
    made = split_balanced(lengths, 2)
    assert made.imbalance <= 1.05
    travelling = {p.document for rank in range(2) for p in made.shared(rank)}
    assert 0 in travelling and len(travelling) <= 2


def _shared(split: SequenceSplit) -> int:
    return sum(p.tokens for rank in range(split.ranks) for p in split.shared(rank))
