"""Ways for ranks to attend over one row that they share, by one interface."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import names
from benchmarks.peers import fastest_kernel
from padless import VarlenLayout, varlen_attention
from padless.parallel import (
    SequenceGroup,
    Shard,
    gather_row,
    ring_attention,
    shard_tokens,
    ulysses_attention,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way.

    Attributes:
        attend: local q, k and v to out.
        take: picks this rank's part of a row `(total, ...)`.
        gather: puts parts together.
        is_alone: whether the first rank computes it all, and the others wait.
        context: is entered for each turn.
    """

    attend: Attend
    take: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    is_alone: bool = False
    context: Callable[[], Any] = nullcontext


def peers(layout: VarlenLayout, mesh: Any) -> dict[str, Peer]:
    """Makes every way that a batch can be attended in, by the name of its row.

    Args:
        layout: documents of the row.
        mesh: of the ranks.
    """

    def identity(row: Tensor) -> Tensor:
        return row

    def sharded(attend: Any, algorithm: str, **options: Any) -> Peer:
        shard = Shard.of(layout, SequenceGroup.of(mesh), algorithm)
        call = functools.partial(attend, layout=layout, mesh=mesh, shard=shard, **options)
        return Peer(call, shard.take, shard.gather)

    made = {
        names.ONE_GPU: Peer(
            functools.partial(varlen_attention, layout=layout), identity, identity, True
        ),
        names.ULYSSES: sharded(ulysses_attention, "ulysses"),
        names.ULYSSES_OVERLAPPED: sharded(ulysses_attention, "ulysses", chunks=2),
        names.RING: sharded(ring_attention, "ring"),
        names.ULYSSES_BY_HAND: Peer(
            functools.partial(_by_hand, layout, mesh.get_group()),
            lambda row: shard_tokens(row, layout, mesh, "ulysses"),
            lambda row: gather_row(row, layout, mesh, "ulysses"),
        ),
    }
    if len(layout.lengths) == 1:
        # It knows no documents.
        made[names.CONTEXT_PARALLEL] = _context_parallel(layout, mesh)
    return made


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad, group=ctx.group)
        return out, None


def _by_hand(layout: VarlenLayout, group: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Does what most scripts do: four exchanges, each waited for, around the fastest kernel.

    The ranks have to divide tokens, heads and KV heads.
    """
    size = dist.get_world_size(group)
    _, kernel = fastest_kernel("cuda" if q.is_cuda else "cpu")

    def to_heads(x: Tensor) -> Tensor:
        own, heads, head_dim = x.shape
        blocks = x.view(own, size, heads // size, head_dim).transpose(0, 1).contiguous()
        out: Tensor = _AllToAll.apply(blocks, group)
        return out.flatten(0, 1)

    out = kernel(to_heads(q), to_heads(k), to_heads(v), layout)
    back: Tensor = _AllToAll.apply(out.unflatten(0, (size, -1)).contiguous(), group)
    return back.transpose(0, 1).reshape(q.shape)


def _context_parallel(layout: VarlenLayout, mesh: Any) -> Peer:
    """Patches SDPA, as torch does it; on a mesh and a balanced split of its own."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    def order() -> Tensor:
        places = torch.arange(layout.total, device=layout.cu_seqlens.device).view(1, 1, -1)
        with context_parallel(
            mesh, buffers=[places], buffer_seq_dims=[2], no_restore_buffers={places}
        ):
            return places.flatten().clone()

    own = order()

    def gather(local: Tensor) -> Tensor:
        (out,) = context_parallel_unshard(mesh, [local.transpose(0, 1).unsqueeze(0)], [2])
        return out[0].transpose(0, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out[0].transpose(0, 1)

    @contextmanager
    def context() -> Iterator[None]:
        # It asks for a buffer to cut, and finds its balance by it.
        places = torch.arange(layout.total, device=layout.cu_seqlens.device).view(1, 1, -1)
        with context_parallel(
            mesh, buffers=[places], buffer_seq_dims=[2], no_restore_buffers={places}
        ):
            yield

    return Peer(attend, lambda row: row.index_select(0, own), gather, context=context)
