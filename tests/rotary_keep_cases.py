"""Checks of the kernel that rotates a decoding step and keeps it, for every device."""

from __future__ import annotations

import torch
from torch import Tensor

from accuracy import draw
from padless.kernels import rotary_torch

# Rows, heads, KV heads, head_dim: one of each; heads that are odd; halves of no power of two; and
# a usual LLaMA's.
SHAPES = [(1, 1, 1, 2), (3, 5, 5, 6), (4, 6, 2, 72), (2, 3, 1, 80), (16, 32, 8, 128)]
CAPACITY = 3


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    tables: torch.dtype | None = None,
) -> list[Tensor]:
    """Draws q, k, v, cos, sin, slots for keys and for values, and which of them are the rows'."""
    rows, heads, kv_heads, head_dim = shape

    def drawn(*sizes: int, seed: int, kind: torch.dtype = dtype) -> Tensor:
        return draw(*sizes, seed=seed, dtype=kind, device=device)

    slots = torch.arange(rows, device=device).flip(0) * CAPACITY + 1
    return [
        drawn(rows, heads, head_dim, seed=1),
        *(drawn(rows, kv_heads, head_dim, seed=seed) for seed in (2, 3)),
        *(drawn(1, rows, head_dim, seed=seed, kind=tables or dtype) for seed in (4, 5)),
        *(drawn(rows * CAPACITY, kv_heads, head_dim, seed=seed) for seed in (6, 7)),
        slots,
    ]


def twin(given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes by torch what q and both kinds of slots are to be."""
    q, k, v, cos, sin, k_slots, v_slots, slots = given
    rotated_q, rotated_k = (rotary_torch.rotated(x, cos[0], sin[0]) for x in (q, k))
    return (
        rotated_q,
        k_slots.index_copy(0, slots, rotated_k),
        v_slots.index_copy(0, slots, v),
    )


def assert_right(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    tables: torch.dtype | None = None,
    roundings: float = 1,
) -> None:
    """Asserts that q is rotated, its keys and values kept, and nothing else written."""
    from padless.kernels.rotary_keep_triton import rotate_and_keep

    given = inputs(shape, dtype, device, tables)
    want = twin(given)
    untouched = [x.clone() for x in given[1:5]]
    rotate_and_keep(*given)
    near = roundings * torch.finfo(dtype).eps
    q, k_slots, v_slots = given[0], given[5], given[6]
    for got, other in ((q, want[0]), (k_slots, want[1])):
        # Where products cancel, their own rounding in float32 is left.
        torch.testing.assert_close(got, other, rtol=near, atol=1e-6)
    assert torch.equal(v_slots, want[2])
    others = torch.ones(k_slots.shape[0], dtype=torch.bool, device=device)
    others[given[7]] = False
    assert torch.equal(k_slots[others], want[1][others])
    for x, before in zip(given[1:5], untouched, strict=True):
        assert torch.equal(x, before)
