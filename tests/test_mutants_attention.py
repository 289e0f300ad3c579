"""Wrong backends on purpose: the checks of numbers and masks go red for each of them.

Every mutant is right attention with one fault, put in where the chosen adapter is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import padless.dispatch
from accuracy import Window, expected_visible
from attention_cases import Case, assert_mask_right, assert_numbers_right
from padless.layout import VarlenLayout
from padless.reference import reference_attention

Backend = Callable[..., Tensor]


def by_mask(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, softmax_scale: float) -> Tensor:
    """Attends over the whole packed row under one mask `(total_q, total_k)`."""
    return reference_attention(
        q[None], k[None], v[None], visible=visible, softmax_scale=softmax_scale
    )[0]


def pairs(
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    causal: bool,
    window_size: Window = (None, None),
) -> Tensor:
    """Says which keys each query sees, sequences apart."""
    blocks = [
        expected_visible(n, m, causal=causal, window_size=window_size)
        for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True)
    ]
    return torch.block_diag(*blocks).bool()


def mutant(
    *,
    mask: Callable[[Tensor, VarlenLayout, VarlenLayout, bool], Tensor] | None = None,
    inputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    scale: Callable[[float], float] | None = None,
    out: Callable[[Tensor], Tensor] | None = None,
    window: Callable[[Window], Window] | None = None,
) -> Backend:
    """Builds a backend with a fault in mask, inputs, scale, output or window; right without one."""

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout_q: VarlenLayout,
        layout_k: VarlenLayout,
        *,
        causal: bool,
        softmax_scale: float,
        window_size: Window,
        deterministic: bool,
    ) -> Tensor:
        if window is not None:
            window_size = window(window_size)
        visible = pairs(layout_q, layout_k, causal, window_size)
        if mask is not None:
            visible = mask(visible, layout_q, layout_k, causal)
        if inputs is not None:
            q, k, v = inputs(q, k, v)
        if scale is not None:
            softmax_scale = scale(softmax_scale)
        got = by_mask(q, k, v, visible, softmax_scale=softmax_scale)
        return got if out is None else out(got)

    return varlen


def top_left(_: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool) -> Tensor:
    """Aligns the causal mask at the first key, as SDPA's `is_causal` does."""
    blocks = [
        torch.ones(n, m).tril().bool() if causal else torch.ones(n, m).bool()
        for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True)
    ]
    return torch.block_diag(*blocks).bool()


def not_causal(_: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, __: bool) -> Tensor:
    """Lets queries see the future."""
    return pairs(layout_q, layout_k, causal=False)


def strictly_before(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Hides each query's own key, `<` for `<=`."""
    return torch.cat([visible[:, 1:], visible[:, :1] & False], dim=1)


def last_key_dropped(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Forgets the last key of the last sequence."""
    wrong = visible.clone()
    wrong[:, -1] = False
    return wrong


def one_pair_leaks(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Shows one query of the last sequence the last key of the sequence before."""
    wrong = visible.clone()
    wrong[-1, sum(layout_k.lengths[:-1]) - 1] = True
    return wrong


def boundaries_ignored(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Takes the packed row for one sequence."""
    return expected_visible(*visible.shape, causal=causal)


def first_key_forgotten(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Ends the window one key early: one pair in the longest row."""
    wrong = visible.clone()
    wrong[-1, sum(layout_k.lengths[:-1])] = False
    return wrong


def groups_swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deals KV heads out in turns, `repeat` for `repeat_interleave`."""
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat(1, groups, 1), v.repeat(1, groups, 1)


def value_off_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs each key with the value of the one before."""
    return q, k, v.roll(1, dims=0)


def keys_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts half of dk off."""
    return q, (k + k.detach()) / 2, v


class WrongDv(torch.autograd.Function):
    """The identity, with a gradient that is 2 % too large."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return 1.02 * dout


def wrong_dv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Is right forward and wrong backward."""
    return q, k, WrongDv.apply(v)


def window_top_left(
    visible: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, causal: bool
) -> Tensor:
    """Counts the window from the first key, and causal from the last."""
    blocks = [
        expected_visible(n, m, causal=causal) & torch.ones(n, m, dtype=torch.bool).triu(-LEFT)
        for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True)
    ]
    return torch.block_diag(*blocks).bool()


# Grouped heads, more keys than queries, and more than one sequence: every mutant shows on it.
CASE = Case("mutant", (9, 20, 12), (14, 20, 17))
LEFT = 4
WINDOW_CASE = Case("mutant_window", (9, 20, 12), (14, 20, 17), window_size=(LEFT, None))
NUMBERS = {
    "top_left": mutant(mask=top_left),
    "not_causal": mutant(mask=not_causal),
    "strictly_before": mutant(mask=strictly_before),
    "last_key_dropped": mutant(mask=last_key_dropped),
    "boundaries_ignored": mutant(mask=boundaries_ignored),
    "groups_swapped": mutant(inputs=groups_swapped),
    "value_off_by_one": mutant(inputs=value_off_by_one),
    "scale_2_percent_off": mutant(scale=lambda scale: 1.02 * scale),
    "scale_left_out": mutant(scale=lambda scale: 1.0),
    "output_2_percent_off": mutant(out=lambda out: 1.02 * out),
    "not_finite": mutant(out=lambda out: torch.where(out == out.max(), float("nan"), out)),
    "dk_halved": mutant(inputs=keys_without_gradient),
    "dv_2_percent_off": mutant(inputs=wrong_dv),
}
WINDOWS = {
    "window_ignored": mutant(window=lambda window: (None, None)),
    "window_one_key_short": mutant(window=lambda window: (LEFT - 1, None)),
    "window_one_key_long": mutant(window=lambda window: (LEFT + 1, None)),
    "window_top_left": mutant(mask=window_top_left),
}
# One wrong pair among hundreds can hide in a rounding budget, never in the probe.
MASKS = {
    name: NUMBERS[name]
    for name in ("top_left", "not_causal", "strictly_before", "last_key_dropped", "groups_swapped")
} | {
    "boundaries_ignored": NUMBERS["boundaries_ignored"],
    "value_off_by_one": NUMBERS["value_off_by_one"],
    "one_pair_leaks": mutant(mask=one_pair_leaks),
    "first_key_forgotten": mutant(mask=first_key_forgotten),
}


def serve(monkeypatch: pytest.MonkeyPatch, varlen: Backend) -> None:
    """Lets every call of `varlen_attention` be served by this backend."""
    monkeypatch.setattr(padless.dispatch, "adapter", lambda name: SimpleNamespace(varlen=varlen))


# float32 is measured by a fixed bound, the half types by budgets: both must see every fault.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checks_are_green_without_a_fault(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, mutant())
    for case in (CASE, WINDOW_CASE):
        assert_numbers_right(case, "sdpa", dtype)
        assert_mask_right(case, "sdpa", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("varlen", NUMBERS.values(), ids=NUMBERS)
def test_numbers_go_red(
    varlen: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, varlen)
    with pytest.raises(AssertionError, match="of sdpa in torch"):
        assert_numbers_right(CASE, "sdpa", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("varlen", MASKS.values(), ids=MASKS)
def test_mask_probe_goes_red(
    varlen: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, varlen)
    with pytest.raises(AssertionError, match="mask entries are wrong"):
        assert_mask_right(CASE, "sdpa", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("varlen", WINDOWS.values(), ids=WINDOWS)
def test_a_wrong_window_goes_red(
    varlen: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, varlen)
    with pytest.raises(AssertionError, match="of sdpa in torch"):
        assert_numbers_right(WINDOW_CASE, "sdpa", dtype)
    with pytest.raises(AssertionError, match="mask entries are wrong"):
        assert_mask_right(WINDOW_CASE, "sdpa", dtype)
