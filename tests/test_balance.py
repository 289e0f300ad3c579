"""`BalancedBatchSampler`: each sample once, budgets, equal costs, the same on every rank."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from balance_checks import (
    CHECKS,
    COST_8B,
    check_balance,
    check_budget,
    check_exactly_once,
    check_resume,
    lognormal,
    of_all_ranks,
)
from padless import BalancedBatchSampler, Imbalance, SequenceCost
from padless.balance import sampler as sampler_module

quickly = settings(deadline=None, max_examples=60, database=None, derandomize=True)
# Budgets from the longest sample on, so that long ones need batches of their own; few samples for
# many ranks; equal lengths.
many_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=70)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds_for_any_lengths(check: Any) -> None:
    @quickly
    @given(many_lengths, st.integers(0, 90), st.integers(1, 8), st.integers(0, 5))
    def run(lengths: list[int], spare: int, num_replicas: int, epoch: int) -> None:
        check(lengths, max(lengths) + spare, num_replicas, epoch)

    run()


@pytest.mark.parametrize("seed", range(4))
def test_balance_of_eight_ranks_on_lognormal_lengths(seed: int) -> None:
    check_balance(seed)


@pytest.mark.parametrize(
    ("longest", "max_tokens", "sigma"), [(8192, 8192, 1.0), (32768, 32768, 1.4), (2048, 65536, 0.5)]
)
def test_balance_where_samples_are_long_or_short_for_the_budget(
    longest: int, max_tokens: int, sigma: float
) -> None:
    lengths = lognormal(4000, longest, seed=3, sigma=sigma)
    sampler = BalancedBatchSampler(lengths, max_tokens, cost=COST_8B, num_replicas=8, rank=0)
    assert sampler.imbalance().epoch <= 1.05
    # Batches are filled: few more of them than the tokens need.
    assert len(sampler) * 8 <= 1.05 * int(lengths.sum()) / max_tokens + 8


def test_imbalance_is_that_of_the_batches() -> None:
    lengths = lognormal(500, 4096, seed=0)
    ranks = of_all_ranks(lengths, 8192, 4, cost=COST_8B, epoch=2)
    sampler = BalancedBatchSampler(lengths, 8192, cost=COST_8B, num_replicas=4, rank=3)
    sampler.set_epoch(2)
    got, want = sampler.imbalance(), Imbalance.of_batches(ranks, lengths, COST_8B)
    assert got.steps == want.steps
    assert (got.epoch, got.worst) == pytest.approx((want.epoch, want.worst), rel=1e-9)


def test_imbalance_by_hand() -> None:
    found = Imbalance.of_costs(torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]]))
    assert found == Imbalance(steps=3, epoch=5 / 4, worst=1.5)
    batches = [[[0], [1, 2]], [[3]]]
    assert Imbalance.of_batches(batches, [1, 5, 5, 3]) == Imbalance(1, 1.5, 1.5)


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_and_seeds_differ(shuffle: bool) -> None:
    lengths = lognormal(300, 1000, seed=1)
    first, second = (
        of_all_ranks(lengths, 4096, 2, epoch=epoch, shuffle=shuffle) for epoch in (0, 1)
    )
    assert (first == second) is not shuffle
    assert of_all_ranks(lengths, 4096, 2, seed=1, shuffle=shuffle) != first
    # Not only the order of the batches: who is in a batch with whom.
    sets = [{frozenset(b) for batches in epoch for b in batches} for epoch in (first, second)]
    assert (len(sets[0] & sets[1]) < len(sets[0]) // 10) is shuffle


def test_all_ranks_in_turn() -> None:
    lengths = lognormal(300, 1000, seed=1)
    ranks = of_all_ranks(lengths, 4096, 3, epoch=1)
    sampler = BalancedBatchSampler(lengths, 4096, num_replicas=3, rank="all")
    sampler.set_epoch(1)
    turns = list(itertools.chain.from_iterable(zip(*ranks, strict=True)))
    assert list(sampler) == turns
    assert len(sampler) == len(turns)
    sampler.load_state_dict({"seed": 0, "epoch": 1, "step": 2})
    assert list(sampler) == turns[6:]


def test_an_epoch_that_was_left_begins_anew() -> None:
    sampler = BalancedBatchSampler([3, 4, 5, 6, 7, 8], 9)
    whole = list(sampler)
    assert next(iter(sampler)) == whole[0]
    assert list(sampler) == whole


@pytest.mark.parametrize("drop_last", [False, True])
def test_remainder_that_cannot_be_split(drop_last: bool) -> None:
    # Each needs a batch of its own, and 11 are no multiple of 4.
    lengths = [90 + i for i in range(11)]
    ranks = of_all_ranks(lengths, 100, 4, drop_last=drop_last)
    seen = sorted(i for batches in ranks for batch in batches for i in batch)
    assert {len(batches) for batches in ranks} == {2 if drop_last else 3}
    # The cheapest are left out, or the shortest comes again.
    assert seen == (list(range(3, 11)) if drop_last else [0, *range(11)])


def test_works_in_a_data_loader() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    sampler = BalancedBatchSampler(lengths, 12)
    loader = DataLoader(lengths, batch_sampler=sampler, collate_fn=list)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert sorted(n for batch in batches for n in batch) == sorted(lengths)
    assert all(sum(batch) <= 12 for batch in batches)


def test_a_million_lengths_are_planned_in_seconds() -> None:
    lengths = lognormal(1_000_000, 8192, seed=0)
    begin = time.perf_counter()
    sampler = BalancedBatchSampler(lengths, 16384, cost=COST_8B, num_replicas=8, rank=0)
    next(iter(sampler))
    # 2 to 4 s on one core of two shared by others; a loop over samples takes minutes.
    assert time.perf_counter() - begin < 30


def test_cost_counts_what_a_model_of_these_sizes_computes() -> None:
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, vocab_size=10,
    )  # fmt: skip
    weights = 3 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12) + 8 * 10
    cost = SequenceCost.from_config(config)
    assert cost == SequenceCost(6 * weights, 7 * 3 * 8)
    assert cost(torch.tensor([2, 5])).tolist() == [
        n * 6 * weights + n * n * 7 * 3 * 8 for n in (2, 5)
    ]
    assert SequenceCost.from_config(config, attention_speed=0.5).quadratic == 2 * cost.quadratic


def _ignore_cost(lengths: Tensor, costs: Tensor, max_tokens: int, count: int, g: Any) -> Tensor:
    return torch.randint(count, lengths.shape, generator=g)


def _forget_state(self: BalancedBatchSampler, state: dict[str, Any]) -> None:
    self.epoch, self._first = state["epoch"], max(0, state["step"] - 1)


def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = list(range(1, 40))
    plan = BalancedBatchSampler._plan
    with monkeypatch.context() as patch:

        def lose(self: BalancedBatchSampler) -> Any:
            samples, ends, order = plan(self)
            return samples[:-1], ends.clamp(max=len(samples) - 1), order

        patch.setattr(BalancedBatchSampler, "_plan", lose)
        with pytest.raises(AssertionError, match="missing"):
            check_exactly_once(lengths, 60, 2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "deal", _ignore_cost)
        with pytest.raises(AssertionError, match="over its budget"):
            check_budget(lengths, 60, 2, 0)

        def mix(self: BalancedBatchSampler) -> Any:
            samples, ends, order = plan(self)
            mixed = torch.tensor(order).flatten()[torch.randperm(len(order) * 8)]
            return samples, ends, mixed.view(-1, 8).tolist()

        # Batches of any cost, in any step: alone, either of them is mended by the other's order.
        patch.setattr(BalancedBatchSampler, "_plan", mix)
        with pytest.raises(AssertionError, match="imbalance"):
            check_balance(0)
    with monkeypatch.context() as patch:
        patch.setattr(BalancedBatchSampler, "load_state_dict", _forget_state)
        with pytest.raises(AssertionError, match="another rest"):
            check_resume(lengths, 60, 2, 1)


@pytest.mark.parametrize(
    ("lengths", "options", "kind", "message"),
    [
        ([], {}, ValueError, r"lengths must have shape \(samples,\), at least one, got \(0,\)"),
        ([[1, 2]], {}, ValueError, r"lengths must have shape .* got \(1, 2\)"),
        ([1.5], {}, TypeError, "lengths must be integers, got torch.float32"),
        ([4, 0], {}, ValueError, "lengths must be 1 or more, got 0 at index 1"),
        ([4, 11], {}, ValueError, "hold the longest sample, got 10 and a sample of 11 .* index 1"),
        ([4], {"num_replicas": 0}, ValueError, "num_replicas must be 1 or more, got 0"),
        ([4], {"rank": 1}, ValueError, 'rank must be "all" or 0 to 0, got 1'),
        ([4], {"rank": "both"}, ValueError, "got 'both'"),
        ([4], {"num_replicas": 2, "drop_last": True}, ValueError, "a sample for each of 2 ranks"),
    ],
)
def test_bad_arguments_are_named(
    lengths: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        BalancedBatchSampler(lengths, 10, **options)


def test_bad_states_are_named() -> None:
    sampler = BalancedBatchSampler([3, 4, 5], 5, seed=1)
    for state, message in (
        ({"seed": 1, "epoch": 0}, "state must have seed, epoch, step, got none of .'step'"),
        ({"seed": 2, "epoch": 0, "step": 0}, "of this sampler's seed 1, got 2"),
        ({"seed": 1, "epoch": 0, "step": 9}, "step must be 0 to 3, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict(state)


def test_bad_costs_are_named() -> None:
    for make, message in (
        (lambda: SequenceCost(0.0), "linear must be a number above 0, got 0.0"),
        (lambda: SequenceCost(1.0, -1.0), "quadratic must be a number of 0 or more, got -1.0"),
        (lambda: SequenceCost.from_config(SimpleNamespace(hidden_size=8)), "without intermediate"),
        (lambda: Imbalance.of_costs(torch.ones(3)), r"shape \(steps, ranks\) .* got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
