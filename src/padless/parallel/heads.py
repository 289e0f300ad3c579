"""Heads of a rank's tokens as blocks to send, one for each rank, and back again.

Both ways each number is moved once. torch's own `cat` and `stack` of transposed tensors move them
two bytes at a time, which reaches a third of the memory's speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# What a thread moves at once.
_WIDE = torch.complex128


def to_blocks(tensors: Sequence[Tensor], size: int, chunks: int) -> tuple[Tensor, ...]:
    """Sorts heads by the rank that attends with them.

    Args:
        tensors: `(own, heads, head_dim)` each. A rank's heads are neighbours, and so are a chunk's.
        size: ranks; size times chunks divides the heads of each tensor.
        chunks: parts of a rank's heads.

    Returns:
        For each chunk `(size, own, heads, head_dim)`, contiguous: block r is for rank r and has its
        heads of all tensors, one behind the other.
    """
    blocks: tuple[Tensor, ...] = _ToBlocks.apply(size, chunks, *tensors)
    return blocks


def to_rows(blocks: Sequence[Tensor]) -> Tensor:
    """Joins what `to_blocks` makes of one tensor.

    Args:
        blocks: `(size, own, heads, head_dim)` for each chunk.

    Returns:
        `(own, size * chunks * heads, head_dim)`.
    """
    rows: Tensor = _ToRows.apply(*blocks)
    return rows


class _ToBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, chunks: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.heads = [x.shape[1] for x in tensors]
        return _pack(tensors, size, chunks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_unpack(grads, ctx.heads)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *blocks: Tensor) -> Tensor:
        ctx.places = blocks[0].shape[0], len(blocks)
        size, _, heads, _ = blocks[0].shape
        return _unpack(blocks, [size * len(blocks) * heads])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return _pack([grad], *ctx.places)


def _pack(tensors: Sequence[Tensor], size: int, chunks: int) -> tuple[Tensor, ...]:
    own, _, head_dim = tensors[0].shape
    heads = sum(x.shape[1] for x in tensors) // (size * chunks)
    blocks = tuple(tensors[0].new_empty(size, own, heads, head_dim) for _ in range(chunks))
    for part, row in _pairs(blocks, tensors):
        _move(row, part)
    return blocks


def _unpack(blocks: Sequence[Tensor], heads: Sequence[int]) -> tuple[Tensor, ...]:
    _, own, _, head_dim = blocks[0].shape
    tensors = tuple(blocks[0].new_empty(own, n, head_dim) for n in heads)
    for part, row in _pairs(blocks, tensors):
        _move(part, row)
    return tensors


def _pairs(blocks: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Finds the places of the same numbers, `(size, own, heads, head_dim)` each."""
    begin, size, chunks = 0, blocks[0].shape[0], len(blocks)
    for x in tensors:
        heads = x.shape[1] // (size * chunks)
        of_chunks = x.unflatten(1, (size, chunks, heads)).transpose(0, 1).unbind(2)
        for block, row in zip(blocks, of_chunks, strict=True):
            yield block.narrow(2, begin, heads), row
        begin += heads


def _move(source: Tensor, target: Tensor) -> None:
    if _is_wide(source) and _is_wide(target):
        source, target = source.view(_WIDE), target.view(_WIDE)
    target.copy_(source)


def _is_wide(x: Tensor) -> bool:
    """Whether each row of numbers can be moved in wide pieces."""
    *strides, last = x.stride()
    places = [x.itemsize * n for n in (x.shape[-1], x.storage_offset(), *strides)]
    # The address too: memory that torch has not allocated may begin anywhere.
    return last == 1 and not any(n % _WIDE.itemsize for n in (*places, x.data_ptr()))
