"""Checks of `merge_rows` for every device: its numbers against the formula in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernel_launches
from padless.kernels.merge import merge_rows
from padless.kernels.merge_torch import merge

NOTHING = float("-inf")


class Case(NamedTuple):
    """Sizes of a call, and which rows it is about.

    Attributes:
        total: rows of out; its logarithms have 3 more.
        rows: how many are merged.
        place: of the first, or "index" for rows that are not neighbours.
        num_heads: heads.
        head_dim: size of one.
    """

    total: int
    rows: int
    place: int | str
    num_heads: int
    head_dim: int


# One number; a block of rows less and more one; heads of no power of two, of one, and wide ones.
CASES = [
    Case(1, 1, 0, 1, 1),
    Case(40, 33, 5, 4, 128),
    Case(40, 32, 8, 2, 128),
    Case(40, 31, 0, 3, 128),
    Case(90, 70, 20, 2, 64),
    Case(50, 21, 7, 3, 72),
    Case(9, 9, 0, 1, 80),
    Case(20, 17, 1, 2, 256),
    Case(100, 45, "index", 4, 128),
    Case(30, 7, "index", 1, 40),
    Case(5, 0, 2, 2, 16),
]
# Of out and of the part: two parts are summed in the kernels' dtype, more in float32.
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
]


def inputs(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, slice | Tensor]:
    """Draws what is merged; NaN wherever nothing may be read or spread."""
    generator = torch.Generator().manual_seed(case.rows + case.head_dim)
    total, rows, place, num_heads, head_dim = case
    index: slice | Tensor
    if isinstance(place, int):
        index = slice(place, place + rows)
    else:
        index = torch.randperm(total, generator=generator)[:rows].sort().values
    out = torch.full((total, num_heads, head_dim), float("nan"))
    lse = torch.full((num_heads, total + 3), float("nan"))
    out[index] = torch.randn(rows, num_heads, head_dim, generator=generator)
    sums = torch.randn(2, num_heads, rows, generator=generator) * 3
    part = torch.randn(rows, num_heads, head_dim, generator=generator)
    if rows > 6:
        # None of the further keys; none before; neither; one by far the larger; beyond exp's reach.
        sums[1, :, 1], sums[0, :, 2], sums[:, :, 3] = NOTHING, NOTHING, NOTHING
        sums[0, :, 4], sums[1, :, 5], sums[:, :, 6] = 90.0, 300.0, 500.0
        out[index] = out[index].masked_fill((sums[0] == NOTHING).T.unsqueeze(-1), 0.0)
        part[1], part[3] = float("nan"), float("inf")
    lse[:, index] = sums[0]
    out, part = out.to(dtypes[0]), part.to(dtypes[1])
    moved = index if isinstance(index, slice) else index.to(device)
    return out.to(device), lse.to(device), part.to(device), sums[1].to(device), moved


def assert_right(
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str = "cpu",
    *,
    roundings: float = 1,
) -> None:
    """Asserts that rows are the formula's, to roundings of half an ulp, and all else stays."""
    out, lse, part, part_lse, place = inputs(case, dtypes, device)
    wide = [x.double() for x in (out[place], lse[:, place], part, part_lse)]
    want, want_lse = merge(*wide)
    before = out.clone(), lse.clone(), part.clone(), part_lse.clone()
    with torch.no_grad():
        merge_rows(out, lse, part, part_lse, place)
    kind = torch.finfo(dtypes[0])
    # Beside the roundings: sums and exponentials in float32.
    allowed = roundings * (kind.eps / 2 * want.abs() + kind.tiny) + 2e-6
    assert want.isfinite().all()
    error = (out[place].double() - want).abs()
    assert (error <= allowed).all(), (error / allowed).max()
    torch.testing.assert_close(lse[:, place].double(), want_lse, rtol=1e-6, atol=1e-6)
    # All else is as it was, to the bit.
    for found, was in ((out, before[0]), (lse.T, before[1].T)):
        found, was = found.clone(), was.clone()
        found[place] = was[place] = 0.0
        torch.testing.assert_close(found, was, rtol=0, atol=0, equal_nan=True)
    for found, was in ((part, before[2]), (part_lse, before[3])):
        torch.testing.assert_close(found, was, rtol=0, atol=0, equal_nan=True)


def assert_rows_without_further_keys_are_bit_equal(dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that rows stay as they are where the further keys are not theirs."""
    out, lse, part, part_lse, place = inputs(CASES[1], (dtype, dtype), device)
    part_lse.fill_(NOTHING)
    before = out.clone(), lse.clone()
    with torch.no_grad():
        merge_rows(out, lse, part.fill_(float("nan")), part_lse, place)
    torch.testing.assert_close(out, before[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, before[1], rtol=0, atol=0, equal_nan=True)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lists the grid of every launch from now on."""
    from padless.kernels import merge_triton

    return kernel_launches.count_launches(monkeypatch, merge_triton, "_merge_kernel")
