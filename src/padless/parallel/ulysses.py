"""Ulysses: each rank attends over all tokens for its share of the heads.

Source: Jacobs et al., "DeepSpeed Ulysses", 2023. One all-to-all brings q, k and v of all tokens,
and one takes the result back, so that any kernel attends over whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from padless.errors import UnsupportedError
from padless.parallel.exchange import Exchange
from padless.parallel.group import SequenceGroup

# q, k and v of all tokens `(total, heads, head_dim)` to out; out's shape is q's.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def reject_heads(num_heads: int, size: int) -> str | None:
    """Says why heads cannot be shared out; None if they can."""
    if num_heads % size:
        return (
            f"Ulysses needs a number of heads that the {size} ranks of sequence_mesh divide, "
            f"got {num_heads}; use sequence_parallel='ring'"
        )
    return None


def copies_of_kv_heads(num_kv_heads: int, size: int) -> int:
    """Counts how often each KV head has to be sent for every rank to get as many.

    The least number at which the ranks divide the copies. Where the ranks divide the query heads,
    it divides the queries of each KV head too.
    """
    return size // math.gcd(size, num_kv_heads)


def attend_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    totals: tuple[int, ...],
    group: SequenceGroup,
    attend: Attend,
    *,
    chunks: int | None = None,
) -> Tensor:
    """Attends over the tokens of all ranks.

    Args:
        q: `(own, num_heads, head_dim)`, this rank's tokens.
        k: `(own, num_kv_heads, head_dim)`.
        v: shape of k.
        totals: tokens of each rank.
        group: who takes part.
        attend: attention over all tokens, for any number of heads.
        chunks: parts into which a rank's heads are cut, to attend to one while others travel;
            default: 2 where its KV heads are an even number, else 1.

    Returns:
        `(own, num_heads, head_dim)`.

    Raises:
        UnsupportedError: the ranks do not divide num_heads.
    """
    size, (own, num_heads, head_dim) = group.size, q.shape
    reason = reject_heads(num_heads, size)
    if reason:
        raise UnsupportedError(reason)
    copies = copies_of_kv_heads(k.shape[1], size)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    kv_heads = k.shape[1] // size
    chunks = (2 if kv_heads % 2 == 0 else 1) if chunks is None else chunks
    if chunks < 1 or kv_heads % chunks:
        raise ValueError(
            f"chunks must divide the {kv_heads} KV heads that each rank attends with, got {chunks}"
        )
    exchange = Exchange(group, totals)
    # (own, size, chunks, heads, head_dim): heads of a rank are neighbours, and so are a chunk's.
    parts = [
        x.reshape(own, size, chunks, x.shape[1] // size // chunks, head_dim) for x in (q, k, v)
    ]
    heads = [part.shape[3] for part in parts]
    sent = [
        exchange.to_heads(torch.cat([part[:, :, chunk] for part in parts], dim=2).transpose(0, 1))
        for chunk in range(chunks)
    ]
    back = []
    for pending in sent:
        out = attend(*pending.wait().split(heads, dim=1))
        back.append(exchange.to_tokens(out))
    outs = torch.stack([pending.wait() for pending in back], dim=1)
    # (size, chunks, own, heads, head_dim) to (own, num_heads, head_dim)
    return outs.permute(2, 0, 1, 3, 4).reshape(own, num_heads, head_dim)
