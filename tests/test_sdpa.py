"""`dense_attention` and SDPA's switches: grouped heads on every torch, masks, and no cuDNN."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accuracy import draw, expected_visible
from attention_cases import Case, assert_mask_right, assert_numbers_right
from padless.backends import sdpa
from padless.backends.sdpa import dense_attention
from padless.reference import reference_attention


def heads_first(num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q `(b, h, s, d)` and k, v `(b, hkv, s, d)`."""
    q = draw(2, 6, 5, 16, seed=1, dtype=torch.float32)
    k, v = (draw(2, num_kv_heads, 5, 16, seed=seed, dtype=torch.float32) for seed in (2, 3))
    return q, k, v


# Every torch can be without `enable_gqa`; only 2.5 and later can be with it.
@pytest.fixture(
    params=sorted({False, sdpa.has_sdpa_gqa()}),
    ids=lambda with_gqa: "enable_gqa" if with_gqa else "repeated",
)
def _grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "has_sdpa_gqa", lambda: request.param)


MASK = expected_visible(5, 5, causal=False)
MASK[:, 3] = False


@pytest.mark.usefixtures("_grouping")
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize(
    "options, visible",
    [
        ({}, None),
        ({"is_causal": True}, expected_visible(5, 5, causal=True)),
        ({"mask": MASK}, MASK),
        ({"mask": torch.zeros(5, 5).masked_fill(~MASK, float("-inf"))}, MASK),
    ],
    ids=["unmasked", "causal", "bool_mask", "additive_mask"],
)
def test_dense_attention_is_right(
    num_kv_heads: int, options: dict[str, Any], visible: Tensor | None
) -> None:
    q, k, v = heads_first(num_kv_heads)
    out = dense_attention(q, k, v, softmax_scale=0.3, **options)
    truth = reference_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), visible=visible, softmax_scale=0.3
    )
    torch.testing.assert_close(out.double(), truth.transpose(1, 2), rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("_grouping")
def test_packed_attention_with_grouped_heads_is_right_on_every_torch() -> None:
    case = Case("grouped", (5, 3, 1), (4, 3, 6), head_dim=16)
    assert_numbers_right(case, "sdpa", torch.float32)
    assert_mask_right(case, "sdpa", torch.float32)


# Lengths at which vendors' backward kernels have had NaN where no key scores well: around tiles.
@pytest.mark.parametrize("lengths", [(704,), (192, 64, 0, 65)], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_sums_whose_logarithm_is_far_below_zero(lengths: tuple[int, ...], backend: str) -> None:
    case = Case("low", lengths, num_heads=4, head_dim=16, softmax_scale=1.0)
    inputs = [x.detach().mul_(0.1) for x in case.inputs(torch.float32)]
    inputs[0] += 3.0
    inputs[1] -= 3.0
    # Above it exp() in float32 is not zero.
    scores = torch.einsum("qhd,kgd->hgqk", *inputs[:2])
    assert scores.logsumexp(-1).max() < -88.7

    def step(dtype: torch.dtype, by: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = case.attend(*leaves, backend=by)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for got, truth in zip(
        step(torch.float32, backend), step(torch.float64, "reference"), strict=True
    ):
        scale = float(truth.detach().abs().max())
        torch.testing.assert_close(got.double(), truth, rtol=0.0, atol=2e-4 * scale)


def test_dropout_is_passed_on() -> None:
    q, k, _ = heads_first(2)
    # A tenth of weights that sum to 1 is missing from sums of ones, and the rest is scaled up.
    out = dense_attention(q, k, torch.ones_like(k), softmax_scale=0.3, dropout_p=0.5)
    assert out.std() > 0.1
    kept = dense_attention(q, k, torch.ones_like(k), softmax_scale=0.3, dropout_p=0.0)
    torch.testing.assert_close(kept, torch.ones_like(kept))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records what SDPA is asked, and lets tensors pretend to be on CUDA."""
    record: list[dict[str, Any]] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        record.append({"num_kv_heads": k.shape[1], "dtype": q.dtype, **options})
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(sdpa, "_kernels", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(sdpa, "has_sdpa_gqa", lambda: True)
    return record


class OnCuda(Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


# On CUDA the flash kernel alone takes grouped heads; it takes neither a mask nor float32.
@pytest.mark.parametrize(
    "dtype, mask, expanded",
    [
        (torch.bfloat16, None, False),
        (torch.float16, None, False),
        (torch.float32, None, True),
        (torch.bfloat16, MASK, True),
        (torch.float32, MASK, True),
    ],
    ids=["bf16", "fp16", "fp32", "bf16_masked", "fp32_masked"],
)
def test_grouped_heads_on_cuda_never_fall_to_the_math_kernel(
    calls: list[dict[str, Any]], dtype: torch.dtype, mask: Tensor | None, expanded: bool
) -> None:
    q, k, v = (x.to(dtype).as_subclass(OnCuda) for x in heads_first(2))
    dense_attention(q, k, v, mask=mask, softmax_scale=0.3)
    assert calls[0]["num_kv_heads"] == (6 if expanded else 2)
    assert calls[0].get("enable_gqa", False) is not expanded


def test_grouped_heads_on_the_cpu_are_not_repeated_in_memory(calls: list[dict[str, Any]]) -> None:
    dense_attention(*heads_first(2), mask=MASK, softmax_scale=0.3)
    assert calls[0]["num_kv_heads"] == 2
    assert calls[0]["enable_gqa"] is True


# One call for each pair of lengths, also where the first queries see no key.
@pytest.mark.parametrize(
    "seqlens_q, seqlens_k, expected",
    [
        ((4, 4, 4), None, 1),
        ((4, 4), (9, 9), 1),
        ((9, 9), (4, 4), 1),
        ((4, 3, 0, 2), None, 3),
        ((4, 3, 4, 0, 3, 4), None, 2),
        ((1, 1, 1, 1), (9, 4, 9, 4), 2),
        ((4, 3), (0, 5), 1),
    ],
    ids=[
        "equal",
        "equal_more_keys",
        "equal_more_queries",
        "ragged",
        "two_groups",
        "decoding",
        "no_key",
    ],
)
def test_sdpa_is_called_once_for_each_pair_of_lengths(
    calls: list[dict[str, Any]],
    seqlens_q: tuple[int, ...],
    seqlens_k: tuple[int, ...] | None,
    expected: int,
) -> None:
    case = Case("count", seqlens_q, seqlens_k, head_dim=16)
    case.attend(*(x.detach() for x in case.inputs(torch.float32)), backend="sdpa")
    assert len(calls) == expected


def test_square_sequences_are_causal_without_a_mask(calls: list[dict[str, Any]]) -> None:
    case = Case("square", (4, 9, 1), (4, 3, 7), head_dim=16)
    case.attend(*(x.detach() for x in case.inputs(torch.float32)), backend="sdpa")
    assert [call["attn_mask"] for call in calls] == [None] * 3
    # One query at the end of its keys sees them all.
    assert [call["is_causal"] for call in calls] == [True, True, False]


@pytest.mark.requires("torch.nn.attention")
def test_cudnn_is_left_out_on_cuda_and_nothing_is_switched_on_the_cpu() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa._kernels(SimpleNamespace(is_cuda=True)):  # type: ignore[arg-type]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with sdpa._kernels(torch.zeros(1)):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_torch_that_cannot_switch_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention", None)
    with sdpa._kernels(SimpleNamespace(is_cuda=True)):  # type: ignore[arg-type]
        pass


# A window narrower than the sequences needs a mask; one that no query comes near needs none.
@pytest.mark.parametrize(
    "causal, window_size, masked, is_causal",
    [
        (True, (None, None), False, True),
        (True, (8, None), False, True),
        (True, (7, None), True, False),
        (False, (8, 8), False, False),
        (False, (8, 7), True, False),
        (False, (None, 0), False, True),
    ],
)
def test_a_mask_is_built_only_for_a_window_that_hides_something(
    calls: list[dict[str, Any]],
    causal: bool,
    window_size: tuple[int | None, int | None],
    masked: bool,
    is_causal: bool,
) -> None:
    case = Case("window", (9,), head_dim=16, causal=causal, window_size=window_size)
    case.attend(*(x.detach() for x in case.inputs(torch.float32)), backend="sdpa")
    assert [(call["attn_mask"] is not None, call["is_causal"]) for call in calls] == [
        (masked, is_causal)
    ]


@pytest.mark.parametrize("repeated", [False, True], ids=["ragged", "in_groups"])
def test_one_sequence_of_a_length_is_not_copied(
    repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend(x.untyped_storage().data_ptr() for x in (q, k, v))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    case = Case("views", (4, 3, 4 if repeated else 2), head_dim=16)
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    case.attend(*inputs, backend="sdpa")
    own = {x.untyped_storage().data_ptr() for x in inputs}
    views = [at in own for at in seen]
    assert views == ([False] * 3 + [True] * 3 if repeated else [True] * 9)


class Told:
    """What torch is told about determinism, for a test."""

    def __init__(self, enabled: bool, warn_only: bool = False) -> None:
        self.enabled, self.warn_only = enabled, warn_only

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(self.enabled, warn_only=self.warn_only)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(False)


# The fused kernels add up dq in any order, unless torch is told for the whole process.
@pytest.mark.requires("torch.nn.attention")
@pytest.mark.parametrize(
    "deterministic, told, fused",
    [
        (False, Told(False), True),
        (False, Told(True), True),
        (True, Told(False), False),
        (True, Told(True, warn_only=True), False),
        (True, Told(True), True),
    ],
    ids=["not_asked", "process_only", "asked", "process_only_warns", "asked_of_both"],
)
def test_gradients_that_repeat_come_from_kernels_that_do(
    deterministic: bool, told: Told, fused: bool
) -> None:
    on_cuda = SimpleNamespace(is_cuda=True)
    with told, sdpa._kernels(on_cuda, deterministic):  # type: ignore[arg-type]
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        assert torch.backends.cuda.mem_efficient_sdp_enabled() == fused
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
