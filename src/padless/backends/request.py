"""What a caller asks of a backend, apart from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRequest:
    """Everything that decides which backend can serve a call.

    Attributes:
        device_type: "cpu", "cuda", ...
        dtype: dtype of q, k and v.
        head_dim: size of one head.
        num_heads: query heads.
        num_kv_heads: key and value heads; a divisor of num_heads.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> AttentionRequest:
        """Describes packed q `(total_q, num_heads, head_dim)` and k."""
        return cls(q.device.type, q.dtype, q.shape[-1], q.shape[-2], k.shape[-2])
