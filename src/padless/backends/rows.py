"""Where the keys of each row are while a batch is decoded: one query a row, a length a row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class CachedRows:
    """The rows of a key buffer `(batch, capacity, num_kv_heads, head_dim)`, each filled in front.

    All of it is on the buffer's device and of fixed shapes, so that a CUDA graph can be made of
    what reads it.

    Attributes:
        lengths: int32 `(batch,)`, keys of each row, the query's own included; at least 1.
        cu_seqlens_q: int32 `(batch + 1,)`, one query a row.
        cu_seqlens_k: int32 `(batch + 1,)`, where rows begin in the buffer without its first border.
        key_padding_mask: bool `(batch, capacity)`, True where a key is; None where nobody asks.
    """

    lengths: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_padding_mask: Tensor | None = None
