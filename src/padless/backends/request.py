"""What a caller asks of a backend, apart from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class AttentionRequest:
    """Everything that decides which backend can serve a call, and can be a key of a cache.

    Attributes:
        device: of q, k and v; with its index on CUDA.
        dtype: dtype of q, k and v.
        head_dim: size of one head.
        num_heads: query heads.
        num_kv_heads: key and value heads; a divisor of num_heads.
        causal: bottom-right aligned, or every key of the window visible.
        window_size: keys visible to the left and to the right of a query's own; None = all.
        deterministic: gradients have to repeat bit for bit.
        needs_grad: autograd will ask for gradients.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    causal: bool
    window_size: Window = (None, None)
    deterministic: bool = False
    needs_grad: bool = False

    @property
    def device_type(self) -> str:
        """Kind of the device: "cpu", "cuda", ..."""
        return self.device.type

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        causal: bool = True,
        window_size: Window = (None, None),
        deterministic: bool = False,
    ) -> AttentionRequest:
        """Describes packed q `(total_q, num_heads, head_dim)`, k and v, and what is asked of them.

        Args:
            q: queries.
            k: keys; dtype and device of q.
            v: values; only read for whether they take gradients.
            causal: bottom-right aligned.
            window_size: keys visible to the left and to the right; None = all.
            deterministic: gradients have to repeat bit for bit.
        """
        tensors = (q, k) if v is None else (q, k, v)
        return cls(
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            num_heads=q.shape[-2],
            num_kv_heads=k.shape[-2],
            causal=causal,
            window_size=window_size,
            deterministic=deterministic,
            needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        )
