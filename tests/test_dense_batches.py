"""Sequences filled up to few dense batches: which go together, and that nothing is mixed up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from accuracy import draw
from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from padless.attention import varlen_attention
from padless.backends import dense_batches as module
from padless.backends import sdpa
from padless.backends.dense_batches import dense_batches, group_lengths
from padless.layout import VarlenLayout

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
WHOLE = Case("whole", (5, 1, 0, 17, 33, 17))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has the CPU fill sequences up as CUDA does; records the shapes that SDPA is called with."""
    monkeypatch.setattr(sdpa, "_fills_up", lambda q: True)
    shapes, real = [], F.scaled_dot_product_attention

    def recorded(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        shapes.append(tuple(q.shape))
        return real(q, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return shapes


# Work worth a call: so much that all sequences are one batch, and so little that each is its own.
@pytest.mark.parametrize("call_flops", [2**31, 7 * 6 * 64 * 300, 0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_and_masks_are_right(
    case: Case, call_flops: int, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(module, "CALL_FLOPS", call_flops)
    assert_numbers_right(case, "sdpa", torch.float32)
    assert_mask_right(case, "sdpa", torch.float32)


def test_short_sequences_are_one_call(calls: list[tuple[int, ...]]) -> None:
    assert_numbers_right(WHOLE, "sdpa", torch.float32)
    assert (5, 6, 33, 64) in calls


def test_a_sequence_that_is_not_finite_does_not_reach_the_others(
    calls: list[tuple[int, ...]],
) -> None:
    layout = VarlenLayout.from_lengths((3, 7, 5))
    q, k, v = (draw(15, 2, 8, seed=n, dtype=torch.float32) for n in range(3))
    for x in (q, k, v):
        x[3:10] = float("nan")
        x.requires_grad_()
    out = varlen_attention(q, k, v, layout, backend="sdpa")
    out.sum().backward()
    assert calls == [(3, 2, 7, 8)]
    for x in (out, q.grad, k.grad, v.grad):
        assert x[:3].isfinite().all() and x[10:].isfinite().all()


@given(LENGTHS, st.integers(1, 2**29))
def test_every_sequence_is_in_one_group_that_is_worth_it(lengths: list[int], flops: int) -> None:
    groups = group_lengths(lengths, flops)
    assert sorted(i for group in groups for i in group) == [i for i, n in enumerate(lengths) if n]
    for group in groups:
        longest = lengths[group[0]]
        for index in group[1:]:
            assert lengths[index] <= longest
            assert (longest**2 - lengths[index] ** 2) // 2 * flops <= module.CALL_FLOPS


@given(LENGTHS, st.integers(1, 2**29))
def test_slots_hold_their_own_sequence_and_places_lead_back(lengths: list[int], flops: int) -> None:
    layout = VarlenLayout.from_lengths(lengths)
    plan = dense_batches(layout, flops)
    slots = torch.cat([gathered for gathered, _ in plan.batches])
    assert torch.equal(slots[plan.places], torch.arange(layout.total))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for gathered, shape in plan.batches:
        rows = document[gathered.view(shape)]
        assert (rows == rows[:, :1]).all()


def test_layers_of_a_forward_share_what_was_made() -> None:
    layout = VarlenLayout.from_lengths((3, 5))
    assert dense_batches(layout, 10) is dense_batches(layout, 10)
    assert dense_batches(layout, 11) is not dense_batches(layout, 10)
