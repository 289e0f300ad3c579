"""`ulysses_attention` and `ring_attention`: `varlen_attention` of tokens that ranks share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from padless.attention import varlen_attention
from padless.backends.request import Window
from padless.layout import VarlenLayout
from padless.parallel.group import SequenceGroup
from padless.parallel.ring_plan import Options
from padless.parallel.shard import Shard


def shard_tokens(row: Tensor, layout: VarlenLayout, mesh: Any, algorithm: str) -> Tensor:
    """Picks this rank's tokens of a flat row that every rank has.

    Args:
        row: `(total, ...)`.
        layout: documents of the whole row.
        mesh: DeviceMesh of one dimension.
        algorithm: "ulysses" or "ring", whose splits differ.

    Returns:
        `(own, ...)`, in the order in which this rank has to hold them.
    """
    return Shard.of(layout, SequenceGroup.of(mesh), algorithm).take(row)


def gather_row(local: Tensor, layout: VarlenLayout, mesh: Any, algorithm: str) -> Tensor:
    """Undoes `shard_tokens` on every rank; each rank has to call it.

    Args:
        local: `(own, ...)`.
        layout: documents of the whole row.
        mesh: DeviceMesh of one dimension.
        algorithm: "ulysses" or "ring".

    Returns:
        `(total, ...)`, whose gradient is the sum of all ranks'.
    """
    return Shard.of(layout, SequenceGroup.of(mesh), algorithm).gather(local)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    mesh: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    deterministic: bool | None = None,
    backend: str = "auto",
    chunks: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Attends within the documents of a row whose tokens ranks share, by shares of the heads.

    Args:
        q: `(own, num_heads, head_dim)`, as `shard_tokens(..., "ulysses")` picks them: of the row
            cut into one stretch a rank, the first ones a token longer where it does not divide.
        k: `(own, num_kv_heads, head_dim)`; fewer KV heads than ranks are sent more than once.
        v: shape of k.
        layout: documents of the whole row, the same on every rank.
        mesh: DeviceMesh of one dimension, whose size divides num_heads.
        causal: as `varlen_attention`, like all that follows up to backend.
        softmax_scale: factor of the scores.
        window_size: keys visible on either side.
        deterministic: whether gradients repeat.
        backend: "auto", or the name of one.
        chunks: parts into which a rank's heads are cut, to attend to one while others travel;
            default: 1 where the ranks are of one host; else 2 if its KV heads are an even number.
        shard: of this layout and mesh, to make it once for many layers.

    Returns:
        `(own, num_heads, head_dim)`.

    Raises:
        TypeError: mesh is not a DeviceMesh.
        ValueError: the mesh has another number of dimensions, or q is not of this rank's tokens.
        RuntimeError: torch.distributed is not initialised.
        UnsupportedError: the ranks do not divide num_heads.

    Note:
        Every rank has to make the call, forward and backward. A rank may have no token.
    """
    shard = shard or Shard.of(layout, SequenceGroup.of(mesh), "ulysses")
    _validate(q, k, v, shard)
    attend = functools.partial(
        varlen_attention,
        layout=layout,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        deterministic=deterministic,
        backend=backend,
    )
    return shard.attend_by_heads(q, k, v, attend, chunks=chunks)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    mesh: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
    shard: Shard | None = None,
) -> Tensor:
    """Attends within the documents of a row whose tokens ranks share, while keys go round.

    Args:
        q: `(own, num_heads, head_dim)`, as `shard_tokens(..., "ring")` picks them.
        k: `(own, num_kv_heads, head_dim)`.
        v: shape of k.
        layout: documents of the whole row, the same on every rank.
        mesh: DeviceMesh of one dimension.
        causal: whether queries see no later keys of their document.
        softmax_scale: factor of the scores, default `head_dim ** -0.5`.
        deterministic: as `varlen_attention`.
        backend: "auto", or the name of one that gives the logarithms of its sums: fa4,
            torch_varlen, sdpa, reference.
        shard: of this layout and mesh, to make it once for many layers.

    Returns:
        `(own, num_heads, head_dim)`.

    Raises:
        TypeError: mesh is not a DeviceMesh.
        ValueError: the mesh has another number of dimensions, or q is not of this rank's tokens.
        RuntimeError: torch.distributed is not initialised.
        BackendUnavailableError: the named backend cannot serve the call.

    Note:
        Every rank has to make the call, forward and backward. A rank may have no token. Differs
        from `varlen_attention` in the order of additions alone; partial results are kept in
        float32, or float64 from float64.
    """
    shard = shard or Shard.of(layout, SequenceGroup.of(mesh), "ring")
    _validate(q, k, v, shard)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return shard.attend_in_ring(q, k, v, Options(causal, scale, deterministic, backend, needs_grad))


def _validate(q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != shard.own:
            raise ValueError(
                f"{name} must hold the {shard.own} tokens of rank {shard.group.rank} as (own, "
                f"heads, head_dim), got {tuple(x.shape)}; pick them with shard_tokens()"
            )
    if v.shape != k.shape or k.shape[2] != q.shape[2] or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"k and v must have one shape, q's head_dim, and a number of heads that divides q's, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
