"""`reference_attention` against its formula in loops, since all else is measured by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accuracy import draw, expected_visible
from padless.reference import causal_visible, reference_attention, visible_keys


def by_loops(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax over visible keys of the dot products, then the weighted sum, number by number."""
    out = torch.zeros_like(q)
    batch, seqlen_q, num_heads, _ = q.shape
    groups = num_heads // k.shape[2]
    for b in range(batch):
        for h in range(num_heads):
            for i in range(seqlen_q):
                keys = [j for j in range(k.shape[1]) if visible[b, h, i, j]]
                weights = [math.exp(scale * float(q[b, i, h] @ k[b, j, h // groups])) for j in keys]
                for j, weight in zip(keys, weights, strict=True):
                    out[b, i, h] += weight / sum(weights) * v[b, j, h // groups]
    return out


# 6 heads over 6, 2 and 1: groups of 1, 3 and 6, which swapped groups cannot get right by chance.
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_reference_is_the_formula(num_kv_heads: int, scale: float | None) -> None:
    q = draw(2, 4, 6, 5, seed=1, dtype=torch.float64)
    k = draw(2, 7, num_kv_heads, 5, seed=2, dtype=torch.float64)
    v = draw(2, 7, num_kv_heads, 5, seed=3, dtype=torch.float64)
    visible = draw(2, 6, 4, 7, seed=4, dtype=torch.float64) > 0
    visible[0, 0, 1] = False
    expected = by_loops(q, k, v, visible, 5**-0.5 if scale is None else scale)
    got = reference_attention(q, k, v, visible=visible, softmax_scale=scale)
    torch.testing.assert_close(got, expected)
    assert not got[0, 1, 0].any()


def test_without_a_mask_every_key_is_visible() -> None:
    q, k, v = (draw(1, 3, 2, 4, seed=seed, dtype=torch.float64) for seed in (1, 2, 3))
    everything = torch.ones(3, 3, dtype=torch.bool)
    torch.testing.assert_close(
        reference_attention(q, k, v), reference_attention(q, k, v, visible=everything)
    )


def test_gradients_are_those_of_finite_differences_also_in_rows_without_a_key() -> None:
    inputs = [
        draw(1, n, h, 2, seed=n, dtype=torch.float64).requires_grad_()
        for n, h in ((4, 2), (2, 1), (2, 1))
    ]
    visible = causal_visible(4, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference_attention(q, k, v, visible=visible), inputs
    )


def test_causal_visible_is_aligned_bottom_right_as_drawn() -> None:
    assert causal_visible(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_visible(4, 2).int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("seqlen_q", [0, 1, 2, 5])
@pytest.mark.parametrize("seqlen_k", [0, 1, 2, 5])
def test_causal_visible_is_the_definition_pair_by_pair(seqlen_q: int, seqlen_k: int) -> None:
    expected = expected_visible(seqlen_q, seqlen_k, causal=True)
    assert torch.equal(causal_visible(seqlen_q, seqlen_k), expected)


def test_window_is_aligned_bottom_right_as_drawn() -> None:
    drawn = visible_keys(2, 4, window_size=(1, 0))
    assert drawn.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("seqlen_q", [0, 1, 2, 5])
@pytest.mark.parametrize("seqlen_k", [0, 1, 2, 5])
@pytest.mark.parametrize("left", [None, 0, 1, 9])
@pytest.mark.parametrize("right", [None, 0, 1, 9])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
def test_window_is_the_definition_pair_by_pair(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, causal: bool
) -> None:
    visible = visible_keys(seqlen_q, seqlen_k, causal=causal, window_size=(left, right))
    assert visible.shape == (seqlen_q, seqlen_k)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            ahead = j - (i + seqlen_k - seqlen_q)
            sees = (
                (not causal or ahead <= 0)
                and (left is None or ahead >= -left)
                and (right is None or ahead <= right)
            )
            assert bool(visible[i, j]) == sees
