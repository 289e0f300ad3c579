"""Checks of silu(gate) * up for every device: numbers by float64, roundings by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_launches
from padless.kernels.silu_mul import silu_mul

HALF_TYPES = (torch.bfloat16, torch.float16)
# One number and none; widths below, at and behind a block, of no vector, and a usual LLaMA's.
SHAPES = [(1, 1, 1), (1, 0, 8), (1, 3, 7), (2, 5, 100), (1, 2, 1024), (3, 1, 1025), (1, 4, 14336)]
NUMBERS = (0.0, -0.0, 1e-6, -1e-6, 3.0, -3.0, 20.0, -20.0, 90.0, -90.0, 3e4, -3e4)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draws gate and up: of the size of activations, with very small and large ones among them."""
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(shape, generator=generator) * 4 for _ in range(2))
    special = torch.tensor(NUMBERS)[: gate.numel()]
    gate.view(-1)[: special.numel()] = special
    up.view(-1)[: special.numel()] = 1.5
    return gate.to(device, dtype), up.to(device, dtype)


def assert_right(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", *, roundings: float = 2
) -> None:
    """Asserts that each number is the formula's, to half an ulp for each of its roundings."""
    gate, up = inputs(shape, dtype, device)
    before = gate.clone(), up.clone()
    out = silu_mul(gate, up)
    assert out.shape == gate.shape and out.dtype == dtype and out.is_contiguous()
    assert out.data_ptr() not in (gate.data_ptr(), up.data_ptr()) or not out.numel()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    wide, factor = gate.double(), up.double()
    truth = wide * torch.sigmoid(wide) * factor
    kind = torch.finfo(dtype)
    # What is smaller than any number, or than one over the largest float32, is zero.
    smallest = kind.tiny * kind.eps + wide.abs() / torch.finfo(torch.float32).max
    allowed = roundings * (kind.eps / 2 * truth.abs() + smallest * (1 + factor.abs()))
    error = (out.double() - truth).abs()
    # What does not fit is infinite, as torch has it.
    is_finite = (F.silu(gate) * up).isfinite()
    assert torch.equal(out.isfinite(), is_finite)
    # Sums and products of float32 are a little off, beside the roundings.
    assert (error <= allowed * 1.01)[is_finite].all(), (error / allowed)[is_finite].max()


def assert_rounded_as_torch_rounds(dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that nearly every number is the one of torch's two operations, to the bit."""
    gate, up = inputs((1, 16, 4096), dtype, device)
    other = F.silu(gate) * up
    same = silu_mul(gate, up) == other
    # One rounding in place of two would be another number in a third of the places.
    assert same[other.isfinite()].float().mean() > 0.995


def assert_what_is_not_finite_stays(dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that NaN and infinity go where torch has them go."""
    nan, inf = float("nan"), float("inf")
    gate = torch.tensor([nan, 1.0, inf, -inf, inf, 0.0], dtype=dtype, device=device)
    up = torch.tensor([1.0, nan, 1.0, 1.0, 0.0, inf], dtype=dtype, device=device)
    torch.testing.assert_close(
        silu_mul(gate, up), F.silu(gate) * up, rtol=0, atol=0, equal_nan=True
    )


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lists the grid of every launch from now on."""
    from padless.kernels import silu_mul_triton

    return kernel_launches.count_launches(monkeypatch, silu_mul_triton, "_silu_mul_kernel")


def assert_nothing_beside_is_written(dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that numbers in front of the output and behind it stay."""
    from padless.kernels import silu_mul_triton

    gate, up = inputs((3, 5), dtype, device)
    memory = torch.full((17,), 7.0, dtype=dtype, device=device)
    silu_mul_triton.silu_mul(gate, up, memory[1:16].view(3, 5))
    assert memory[0] == 7 and memory[16] == 7
    torch.testing.assert_close(memory[1:16].view(3, 5), F.silu(gate) * up)
