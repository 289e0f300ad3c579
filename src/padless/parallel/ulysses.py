"""Ulysses: each rank attends over all tokens for its share of the heads.

Source: Jacobs et al., "DeepSpeed Ulysses", 2023. One all-to-all brings q, k and v of all tokens,
and one takes the result back, so that any kernel attends over whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from padless.errors import UnsupportedError
from padless.parallel.exchange import Exchange
from padless.parallel.group import SequenceGroup
from padless.parallel.heads import to_blocks, to_rows

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
            default: 1 where the ranks are of one host; else 2 if its KV heads are an even number.

    Returns:
        `(own, num_heads, head_dim)`.

    Raises:
        UnsupportedError: the ranks do not divide num_heads.
    """
    size = group.size
    reason = reject_heads(q.shape[1], size)
    if reason:
        raise UnsupportedError(reason)
    copies = copies_of_kv_heads(k.shape[1], size)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    kv_heads = k.shape[1] // size
    if chunks is None:
        # Between two H200 of a host data travels in 5 % of the time, and kernels that share the
        # device with it, each for half of the heads, lose more: efficiency 0.935 for 0.947 at 32768
        # tokens, 0.970 for 0.984 at 131072, 32/8 heads of 128 in bfloat16 (2026-11-28).
        chunks = 2 if kv_heads % 2 == 0 and not group.is_within_host else 1
    if chunks < 1 or kv_heads % chunks:
        raise ValueError(
            f"chunks must divide the {kv_heads} KV heads that each rank attends with, got {chunks}"
        )
    exchange = Exchange(group, totals)
    heads = [x.shape[1] // (size * chunks) for x in (q, k, v)]
    sent = [exchange.to_heads(blocks) for blocks in to_blocks((q, k, v), size, chunks)]
    back = []
    for pending in sent:
        out = attend(*pending.wait().split(heads, dim=1))
        back.append(exchange.to_tokens(out))
    return to_rows([pending.wait() for pending in back])
