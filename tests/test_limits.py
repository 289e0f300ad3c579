"""Which GPUs, heads, strides and sizes flash kernels take; needs no GPU and no memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from padless.backends.limits import (
    flash2_scratch_overflow,
    in_reach,
    reject_flash2_head_dim,
    reject_gpu,
    token_overflow,
)
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

REQUEST = AttentionRequest(
    torch.device("cuda", 1), torch.bfloat16, 128, 32, 8, causal=True, needs_grad=True
)


@pytest.fixture
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs: the current one is of another kind than the one that is asked for."""
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device=None: capabilities[0 if device is None else device.index],
    )


def layout(*lengths: int) -> VarlenLayout:
    """Builds a layout, which takes no memory for its tokens."""
    return VarlenLayout.from_lengths(lengths)


@pytest.mark.usefixtures("_gpus")
@pytest.mark.parametrize(
    "changes, major, reason",
    [
        ({}, None, None),
        ({}, (9, 10), None),
        ({"dtype": torch.float16}, (9,), None),
        ({"device": torch.device("cpu")}, None, "needs CUDA, got cpu"),
        ({"device": torch.device("mps")}, None, "needs CUDA, got mps"),
        ({"dtype": torch.float32}, None, "needs float16 or bfloat16, got torch.float32"),
        ({"device": torch.device("cuda", 0)}, None, "needs compute capability 8.0, got (7, 5)"),
        (
            {"device": torch.device("cuda", 0)},
            (9, 10),
            "needs compute capability 9.x or 10.x, got (7, 5)",
        ),
        ({}, (10,), "needs compute capability 10.x, got (9, 0)"),
    ],
)
def test_the_gpu_of_the_tensors_is_asked_and_not_the_current_one(
    changes: dict[str, object], major: tuple[int, ...] | None, reason: str | None
) -> None:
    assert reject_gpu(replace(REQUEST, **changes), major=major) == reason


@pytest.mark.usefixtures("_gpus")
def test_compute_capability_says_nothing_of_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reject_gpu(replace(REQUEST, device=torch.device("cuda", 0))) is None
    assert reject_gpu(REQUEST, major=(9,)) == "needs an NVIDIA GPU, got an AMD one"


# Backwards of large heads need more shared memory than the smaller GPUs of a generation have.
@pytest.mark.parametrize(
    "capability, head_dim, needs_grad, reason",
    [
        ((8, 0), 256, True, None),
        ((9, 0), 256, True, None),
        ((8, 6), 192, True, None),
        ((8, 6), 256, False, None),
        (
            (8, 6),
            256,
            True,
            "needs head_dim up to 192 for gradients on compute capability (8, 6)",
        ),
        (
            (12, 0),
            200,
            True,
            "needs head_dim up to 192 for gradients on compute capability (12, 0)",
        ),
        ((8, 0), 264, False, "needs head_dim a multiple of 8 up to 256, got 264"),
        ((8, 0), 100, False, "needs head_dim a multiple of 8 up to 256, got 100"),
    ],
)
def test_head_dim_is_limited_by_the_gpu(
    capability: tuple[int, int],
    head_dim: int,
    needs_grad: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    request = replace(REQUEST, head_dim=head_dim, needs_grad=needs_grad)
    assert reject_flash2_head_dim(request) == reason


def reaches(rows: int, sequences: int, heads: int, rounded: int) -> bool:
    """Computes the last index of dq's scratch as the kernel's int does, and says if it is right."""
    index = (rows - 1 + 128 * (sequences - 1)) * heads * rounded + heads * rounded - 1
    return index < 2**31


# Each pair stands on both sides of the kernel's own limit, short sequences and long ones.
@pytest.mark.parametrize(
    "head_dim, rounded", [(64, 64), (72, 96), (128, 128), (160, 192), (256, 256)]
)
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("length", [1, 128, 5000])
def test_scratch_is_never_indexed_past_an_int(
    head_dim: int, rounded: int, heads: int, length: int
) -> None:
    request = replace(REQUEST, num_heads=heads, head_dim=head_dim)
    rows = -(-length // 128) * 128
    most = (2**31 // (heads * rounded) - rows) // 128
    for n in range(most - 3, most + 4):
        accepted = flash2_scratch_overflow(request, layout(*[length] * n)) is None
        assert accepted <= reaches(rows, n, heads, rounded)
        # Nor is much refused that would be right.
        assert accepted >= reaches(rows, n + 2, heads, rounded)


def test_scratch_belongs_to_gradients_only_and_its_reason_says_the_sizes() -> None:
    many = layout(*[7] * 5000)
    assert flash2_scratch_overflow(replace(REQUEST, needs_grad=False), many) is None
    assert flash2_scratch_overflow(REQUEST, many) == (
        "the scratch of its backward would pass 2**31 numbers: 5000 sequences of up to 7 tokens, "
        "32 heads of 128"
    )
    assert flash2_scratch_overflow(REQUEST, layout(*[7] * 4000)) is None


# 32 heads of 128 are 4096 numbers a token: 2**19 tokens are 2**31 of them.
@pytest.mark.parametrize(
    "total_q, total_k, fits",
    [
        (2**19 - 1, 2**19 - 1, True),
        (2**19, 2**19, False),
        (1, 2**21 - 1, True),
        (1, 2**21, False),
    ],
)
def test_offsets_of_32_bits_reach_fewer_than_two_to_the_31(
    total_q: int, total_k: int, fits: bool
) -> None:
    reason = token_overflow(REQUEST, layout(total_q), layout(total_k))
    assert (reason is None) == fits
    if not fits:
        assert reason == (
            f"its offsets reach fewer than 2**31 numbers: {total_q} queries in 32 heads of 128, "
            f"{total_k} keys in 8"
        )


def test_only_tensors_that_loads_do_not_fit_are_copied() -> None:
    fused = torch.zeros(5, 12, 16, dtype=torch.bfloat16)
    for fits in (fused, fused[:, 4:8], fused.transpose(0, 1).contiguous().transpose(0, 1)):
        assert in_reach(fits) is fits
    flat = torch.zeros(5 * 4 * 16 + 1, dtype=torch.bfloat16)
    for off in (
        flat[1:].view(5, 4, 16),
        torch.zeros(5, 4, 17, dtype=torch.bfloat16)[..., :16],
        torch.zeros(16, 4, 5, dtype=torch.bfloat16).permute(2, 1, 0),
        # Rows so far apart that 32 bits do not reach over one.
        torch.zeros(1, dtype=torch.bfloat16).as_strided((1, 1, 1), (2**31, 8, 1)),
    ):
        made_good = in_reach(off)
        assert made_good is not off
        assert made_good.is_contiguous()
        assert made_good.data_ptr() % 16 == 0
        assert torch.equal(made_good, off)
