"""By which algorithm less travels: pure functions of documents, heads and ranks.

Counted are the bytes of the rank that sends most in vectors: `head_dim` numbers of one token, which
cost the same by either algorithm. The same arguments give the same answer on every rank, which
nobody has to ask the others for.
"""

from __future__ import annotations

from padless.parallel.split import SequenceSplit
from padless.parallel.ulysses import copies_of_kv_heads, reject_heads


def sent_by_ulysses(tokens: int, num_heads: int, num_kv_heads: int, size: int) -> int:
    """Counts the vectors that a rank of Ulysses sends in a forward: q, k, v and out.

    Args:
        tokens: of the whole row.
        num_heads: query heads, which the ranks divide.
        num_kv_heads: KV heads; fewer than ranks are sent more than once.
        size: ranks of the group.
    """
    own = -(-tokens // size)
    kv_heads = num_kv_heads * copies_of_kv_heads(num_kv_heads, size)
    heads_of_others = (num_heads + 2 * kv_heads) // size * (size - 1)
    return own * heads_of_others + (tokens - own) * (num_heads // size)


def sent_by_ring(split: SequenceSplit, num_kv_heads: int) -> int:
    """Counts the vectors that a rank of the ring sends in a forward: keys and values.

    What travels are tokens of documents that are cut. A rank sends on what has arrived, and so
    sends all of them but those of the rank behind it.

    Args:
        split: of the row, by `split_balanced`.
        num_kv_heads: KV heads.
    """
    shared = [sum(piece.tokens for piece in split.shared(rank)) for rank in range(split.ranks)]
    return 2 * num_kv_heads * (sum(shared) - min(shared))


def backward_over_forward(size: int) -> float:
    """Says how many times what it sends forward the ring sends backward, in half precision.

    Keys and values travel once less, since the last that came are still there. Their gradients go
    all the way: on two ranks in the keys' dtype, on more as sums in float32.

    Args:
        size: ranks of the group.
    """
    return 1.0 if size <= 2 else (size - 2) / (size - 1) + 2.0


def choose_algorithm(split: SequenceSplit, num_heads: int, num_kv_heads: int) -> str:
    """Takes "ulysses" or "ring" for a row: whose ranks send less, Ulysses where it is the same.

    Less forward and backward together; by Ulysses one sends as much as the other.

    Args:
        split: of the row as the ring would cut it, by `split_balanced`.
        num_heads: query heads; where the ranks do not divide them, there is the ring alone.
        num_kv_heads: KV heads.
    """
    if reject_heads(num_heads, split.ranks):
        return "ring"
    by_heads = 2 * sent_by_ulysses(sum(split.lengths), num_heads, num_kv_heads, split.ranks)
    by_ring = sent_by_ring(split, num_kv_heads) * (1 + backward_over_forward(split.ranks))
    return "ring" if by_ring < by_heads else "ulysses"
