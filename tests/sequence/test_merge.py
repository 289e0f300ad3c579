"""Attention over keys in parts is attention over all of them, whatever the parts are."""

from __future__ import annotations

import pytest
import torch

from padless.backends import reference
from padless.kernels.merge_torch import merge
from padless.layout import VarlenLayout

NOTHING = float("-inf")


def _parts(keys: int, scale: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64) * scale
    k, v = torch.randn(2, keys, 2, 8, generator=generator, dtype=torch.float64) * scale
    return q, k, v


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layouts = (VarlenLayout.from_lengths([len(x)]) for x in (q, k))
    return reference.varlen_with_lse(q, k, v, *layouts, causal=False, softmax_scale=1.0)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 9), (0, 5), (10,)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_parts_make_the_whole(cuts: tuple[int, ...], scale: float) -> None:
    q, k, v = _parts(10, scale)
    out, lse = torch.zeros_like(q), torch.full((4, 6), NOTHING, dtype=q.dtype)
    for start, stop in zip((0, *cuts), (*cuts, 10), strict=True):
        out, lse = merge(out, lse, *_attend(q, k[start:stop], v[start:stop]))
    for got, want in zip((out, lse), _attend(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_rows_that_see_nothing_stay_as_they_are() -> None:
    # Kernels leave anything in such rows, NaN too.
    q, k, v = _parts(5, 1.0)
    out, lse = (x.float() for x in _attend(q, k, v))
    part, part_lse = torch.full_like(out, float("nan")), torch.full_like(lse, NOTHING)
    after = merge(out, lse, part, part_lse)
    assert torch.equal(after[0], out) and torch.equal(after[1], lse)


def test_rows_that_have_seen_nothing_are_zero() -> None:
    out, lse = torch.zeros(2, 1, 4), torch.full((1, 2), NOTHING)
    out, lse = merge(out, lse, torch.full((2, 1, 4), float("nan")), torch.full((1, 2), NOTHING))
    assert (out == 0).all() and (lse == NOTHING).all()


def test_sums_that_overflow_are_right_in_float32() -> None:
    out, lse = torch.ones(1, 1, 2), torch.tensor([[500.0]])
    out, lse = merge(out, lse, torch.full((1, 1, 2), 3.0), torch.tensor([[500.0]]))
    torch.testing.assert_close(out, torch.full((1, 1, 2), 2.0))
    torch.testing.assert_close(lse, torch.tensor([[500.0 + 0.693147]]))


def test_half_types_are_merged_in_float32_and_not_rounded_before() -> None:
    q, k, v = _parts(10, 1.0)
    (out, lse), (part, part_lse) = (_attend(q, k[n], v[n]) for n in (slice(4), slice(4, 10)))
    halves = out.bfloat16(), part.bfloat16()
    got = merge(halves[0], lse.float(), halves[1], part_lse.float())
    want = merge(halves[0].double(), lse, halves[1].double(), part_lse)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_gradients_of_the_reference_are_autograds(causal: bool, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    layout_q, layout_k = (VarlenLayout.from_lengths(n) for n in ([3, 0, 5], [4, 2, 5]))
    q = torch.randn(8, heads[0], 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 11, heads[1], 8, generator=generator, dtype=torch.float64)
    dout = torch.randn(8, heads[0], 8, generator=generator, dtype=torch.float64)
    options = {"causal": causal, "softmax_scale": 0.5}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.varlen(*leaves, layout_q, layout_k, **options)
    expected.backward(dout)
    out, lse = reference.varlen_with_lse(q, k, v, layout_q, layout_k, **options)
    grads = reference.gradients(dout, q, k, v, out, lse, layout_q, layout_k, **options)
    torch.testing.assert_close(out, expected.detach())
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad)
