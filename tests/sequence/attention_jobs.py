"""What each rank of a pool does for the tests of the bare operations."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from padless import VarlenLayout
from padless.parallel import gather_row, ring_attention, shard_tokens, ulysses_attention

ATTEND = {"ulysses": ulysses_attention, "ring": ring_attention}


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def drawn(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """q, k, v and dout, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    num_heads, num_kv_heads = heads
    made = [
        torch.randn(sum(lengths), n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    return made[0] * scale, made[1] * scale, made[2], made[3]


def attend(
    algorithm: str,
    lengths: list[int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """out, dq, dk and dv of the whole row, put together from all ranks."""
    layout = VarlenLayout.from_lengths(lengths)
    whole = drawn(lengths, heads, dtype, scale)
    q, k, v, dout = (shard_tokens(x, layout, mesh(), algorithm) for x in whole)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ATTEND[algorithm](*leaves, layout, mesh(), **options)
    out.backward(dout)
    found = (out.detach(), *(x.grad for x in leaves))
    return tuple(gather_row(x, layout, mesh(), algorithm) for x in found)
