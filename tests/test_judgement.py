"""Backends prove themselves by numbers: right ones pass, and every planted fault is caught."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from padless.backends import reference, sdpa
from padless.backends.request import AttentionRequest
from padless.qualification import probe as probe_module
from padless.qualification import qualify
from padless.qualification.judgement import judge
from padless.qualification.probe import draw_codes, draw_gaussian, draw_outliers, probed_heads
from planted_backends import FAULTS, flash_like, gradient_with, planted, with_inputs, with_out
from qualification_cases import FLOAT32, HALF_AND_FLOAT, TRAINING

pytestmark = pytest.mark.usefixtures("cache")


# Groups of one, three, all, and many; heads below, at and above what kernels are built for.
FAMILIES = [
    replace(TRAINING, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    for num_heads, num_kv_heads, head_dim in [(2, 2, 64), (6, 2, 64), (3, 1, 33), (32, 1, 16)]
    for options in (
        {},
        {"causal": False},
        {"needs_grad": False},
        {"window_size": (7, 0)},
        {"causal": False, "window_size": (200, 3)},
        {"deterministic": True},
    )
]


def in_words(request: AttentionRequest) -> str:
    words = [str(request.head_dim), str(request.num_heads), str(request.num_kv_heads)]
    words += ["causal"] * request.causal + ["grad"] * request.needs_grad
    words += ["det"] * request.deterministic + [f"w{n}" for n in request.window_size if n]
    return "-".join(words)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("family", FAMILIES, ids=in_words)
@pytest.mark.parametrize("backend", [sdpa, reference], ids=lambda backend: backend.NAME)
def test_right_backends_pass_with_room_to_spare(
    backend: Any, family: AttentionRequest, dtype: torch.dtype
) -> None:
    request = replace(family, dtype=dtype)
    assert backend.reject(request) is None
    judgement = judge(backend.varlen, request, seed=3)
    assert judgement.reason == ""
    assert judgement.ratio < 0.8, judgement


@HALF_AND_FLOAT
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_backend_that_rounds_as_flash_kernels_do_passes_with_room_to_spare(
    dtype: torch.dtype, needs_grad: bool
) -> None:
    for num_heads, num_kv_heads, head_dim in [(6, 2, 64), (4, 1, 128), (2, 2, 40)]:
        verdict = qualify(
            planted(),
            replace(
                TRAINING,
                dtype=dtype,
                needs_grad=needs_grad,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
            ),
        )
        assert verdict.passed
        assert verdict.reason == ""
        assert 0 < verdict.ratio < 0.7
        assert verdict.elapsed_ms > 0


@HALF_AND_FLOAT
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str, dtype: torch.dtype) -> None:
    verdict = qualify(planted(FAULTS[fault]), replace(TRAINING, dtype=dtype))
    assert not verdict.passed
    assert verdict.reason
    assert verdict.ratio > 1


# What the reason has to say of it, in bfloat16.
REASONS = {
    "dq_off_by_2_percent": r"dq of head \d is off by 2\.?\d* % on gaussian inputs, 1\.\d+ times",
    "dk_of_one_head_off_by_5_percent": r"dk of head 1 is off by [45]\.\d+ % on gaussian inputs, ",
    "wrong_kv_head": r"out of head \d is off by 1\d\d % on gaussian inputs, 1\d\d times its budget",
    "dq_wrong_on_outliers_only": r"dq of head \d is off by \d+\.?\d* % on outlier inputs, ",
    "nan_on_outliers_only": r"out of head 0 is not finite on outlier inputs",
    "nan_without_keys": r"out of head \d is not finite on outlier inputs",
    "memory_in_dv_without_queries": r"dv of head \d is not finite on outlier inputs",
    "another_dtype": r"out has shape \(100, 6, 64\) and dtype torch\.float64 on gaussian inputs",
    "another_shape": r"raised RuntimeError: The size of tensor a \(384\) must match",
}


@pytest.mark.parametrize("fault", REASONS)
def test_the_reason_names_tensor_error_and_inputs(fault: str) -> None:
    assert re.match(REASONS[fault], qualify(planted(FAULTS[fault]), TRAINING).reason)


def ignoring(option: str, value: Any) -> Any:
    """A backend that takes an option and does not heed it."""

    def attend(*args: Any, **options: Any) -> Tensor:
        return flash_like(*args, **{**options, option: value})

    return planted(attend)


def noisy(*args: Any, **options: Any) -> Tensor:
    """A backend whose dk depends on which of its sums came first."""
    q, k, v, *layouts = args
    noise = 2.0**-9 * torch.randn(k.shape)
    return flash_like(
        q, gradient_with(k, lambda dk: (dk * (1 + noise)).to(k)), v, *layouts, **options
    )


def wrong_when_decoding(*args: Any, **options: Any) -> Tensor:
    out = flash_like(*args, **options)
    return 1.1 * out if args[3].max_seqlen == 1 else out


@HALF_AND_FLOAT
@pytest.mark.parametrize(
    "backend, changes",
    [
        (ignoring("window_size", (None, None)), {"window_size": (7, 0)}),
        # Longer than every sequence of a probe, as the windows of models are.
        (ignoring("window_size", (None, None)), {"window_size": (4096, 0)}),
        (ignoring("window_size", (None, None)), {"causal": False, "window_size": (None, 5)}),
        (ignoring("causal", False), {}),
        (ignoring("causal", True), {"causal": False}),
        (ignoring("softmax_scale", 0.13), {}),
        (planted(noisy), {"deterministic": True}),
        (planted(wrong_when_decoding), {"needs_grad": False}),
    ],
    ids=[
        "window",
        "long window",
        "right window",
        "causal",
        "not causal",
        "scale",
        "noise",
        "decode",
    ],
)
def test_an_option_that_is_not_heeded_fails(
    backend: Any, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    request = replace(TRAINING, dtype=dtype, **changes)
    assert not qualify(backend, request).passed
    assert qualify(planted(name="heeding"), request).passed


def test_a_single_wrong_number_fails() -> None:
    def spoil(out: Tensor, q: Tensor, *_: Any) -> Tensor:
        # Not where q is zero: the mask probe is finer.
        if q.any():
            out[70, 1, 5] += 0.15
        return out

    verdict = qualify(planted(with_out(spoil)), TRAINING)
    assert re.match(r"the largest out is off by \d\.\d+ % on gaussian inputs, ", verdict.reason)


def test_noise_in_the_last_bits_is_no_fault_where_it_was_not_excluded() -> None:
    assert qualify(planted(noisy), TRAINING).passed
    assert qualify(planted(noisy), replace(TRAINING, deterministic=True)).reason == (
        "a second run gives other numbers"
    )


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mask_probe_sees_every_single_wrong_pair(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int
) -> None:
    request = replace(
        TRAINING, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=32
    )
    probe = draw_codes(request, 0)
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        # Within a sequence and across, seen and unseen, first and last rows too.
        query, key = (
            min(int(torch.randint(-3, layout.total, (), generator=generator)), layout.total - 1)
            for layout in (probe.layout_q, probe.layout_k)
        )

        def flipped(mask: Tensor, pair: tuple[int, int] = (query, key)) -> Tensor:
            if mask.shape == (probe.layout_q.total, probe.layout_k.total):
                mask[pair] = ~mask[pair]
            return mask

        def attend(*args: Any, flipped: Any = flipped, **options: Any) -> Tensor:
            return flash_like(*args, mask=flipped, **options)

        assert "(the mask probe)" in judge(attend, request).reason, (i, query, key)


def test_a_large_group_is_no_false_alarm_at_the_lengths_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_module, "_kind", lambda request: "gpu")
    request = replace(TRAINING, num_heads=32, num_kv_heads=1, head_dim=16, causal=False)
    judgement = judge(sdpa.varlen, request)
    assert judgement.reason == ""
    assert judgement.ratio < 0.8


def test_the_mask_probe_sees_one_wrong_pair_in_dv_alone() -> None:
    # By which the gradient of that key moves: one row of signs in the scale of dout.
    def one_more(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        def spoil(dv: Tensor) -> Tensor:
            dv[17, -1, ::2] += 1 / 16
            dv[17, -1, 1::2] -= 1 / 16
            return dv

        return (q, k, v) if q.any() else (q, k, gradient_with(v, spoil))

    verdict = qualify(planted(with_inputs(one_more)), TRAINING)
    assert verdict.reason == "dv is not of exactly the visible keys (the mask probe)"


def test_numbers_that_are_not_finite_in_the_mask_probe_fail() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return gradient_with(q, lambda dq: dq if q.any() else dq * float("nan")), k, v

    verdict = qualify(planted(with_inputs(attend)), TRAINING)
    assert verdict.reason == "numbers are not finite on the mask probe"


def test_outlier_inputs_have_the_spread_of_activations() -> None:
    probe = draw_outliers(TRAINING, 0)
    for x in (probe.q, probe.k, probe.v, probe.dout):
        by_channel = x.float().square().mean((0, 1)).sqrt()
        assert 15 < by_channel.max() / by_channel.median() < 100
        assert by_channel.sort().values[-4] < 3 * by_channel.median()
    assert probe.k.float().mean((0, 1)).max() > 25
    assert not any(x.is_contiguous() for x in (probe.q, probe.k, probe.v))
    scores = torch.einsum("shd,td->hst", probe.q.float(), probe.k[:, 0].float()) / 8
    largest = scores[:, :20, :33].softmax(-1).amax(-1).median(1).values
    # Flat in the first head, peaked in the fifth, and far from zero in the last.
    assert largest[0] < 0.3
    assert largest[4] > 0.5
    assert scores[-1].mean() > 20
    assert scores[:-1].abs().max() < 60


def test_probes_stay_within_float16() -> None:
    for head_dim in (16, 128, 256, 512):
        request = replace(TRAINING, dtype=torch.float16, head_dim=head_dim)
        for draw in (draw_gaussian, draw_outliers, draw_codes):
            probe = draw(request, 0)
            assert all(x.isfinite().all() for x in (probe.k, probe.v, probe.dout))
        assert judge(reference.varlen, request).reason == ""


def test_float32_is_judged_by_what_kernels_of_tf32_products_reach() -> None:
    # Three TF32 products have errors of some 1e-6, one has 1e-3 and is not float32.
    def rounded(bits: int) -> Any:
        def change(out: Tensor, *_: Any) -> Tensor:
            return out * (1 + 2.0**-bits * torch.rand(out.shape).sub(0.5))

        return planted(with_out(change))

    assert qualify(rounded(16), FLOAT32).passed
    assert not qualify(rounded(10), replace(FLOAT32, head_dim=72)).passed


def test_probes_have_the_groups_of_the_request_and_few_heads() -> None:
    for (num_heads, num_kv_heads), on_cpu, on_gpu in [
        ((32, 8), (8, 2), (32, 8)),
        ((64, 8), (16, 2), (32, 4)),
        ((71, 1), (71, 1), (71, 1)),
        ((128, 128), (2, 2), (32, 32)),
        ((9, 3), (6, 2), (9, 3)),
    ]:
        request = replace(TRAINING, num_heads=num_heads, num_kv_heads=num_kv_heads)
        assert probed_heads(request) == on_cpu
        assert probed_heads(replace(request, device=torch.device("cuda", 0))) == on_gpu
