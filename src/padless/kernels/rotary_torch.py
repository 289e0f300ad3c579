"""The rotary embedding of q and k in torch: for the CPU, for GPUs without Triton, for compilers."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of q or k that the CPU rotates at a time, so that what it keeps in between stays in its
# cache. Xeon with 2 MB of L2 a core, one thread, (2048, 32, 128) in bfloat16: 13 ms, and 43 ms all
# at once; from 64k to 256k numbers alike (2026-11).
_CHUNK = 2**17


def rotate(
    q: Tensor | None,
    k: Tensor | None,
    out_q: Tensor | None,
    out_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    transposed: bool,
) -> None:
    """Rotates q into out_q and k into out_k, which may be q and k; not differentiable.

    Args:
        q: `(total, num_heads, head_dim)`; None with out_q.
        k: `(total, num_kv_heads, head_dim)`; None with out_k.
        out_q: shape of q.
        out_k: shape of k.
        cos: `(total, head_dim)`.
        sin: `(total, head_dim)`.
        transposed: whether to rotate back.
    """
    given = [(x, out) for x, out in ((q, out_q), (k, out_k)) if x is not None and out is not None]
    if not given:
        return
    wide = _computed_in(given[0][0])
    cos, sin = (table.to(wide).unsqueeze(1) for table in (cos, sin))  # (n, 1, d)
    sin1, sin2 = sin.chunk(2, -1)
    turned = (sin2, sin1) if transposed else (sin1, sin2)
    for x, out in given:
        tensors = (x, out, cos, *turned)
        if x.numel() <= _CHUNK or x.device.type != "cpu":
            _rotate_piece(*tensors, sign=1 if transposed else -1)
            continue
        tokens = max(1, _CHUNK // x[0].numel())
        for piece in zip(*(tensor.split(tokens) for tensor in tensors), strict=True):
            _rotate_piece(*piece, sign=1 if transposed else -1)


def _rotate_piece(
    x: Tensor, out: Tensor, cos: Tensor, onto1: Tensor, onto2: Tensor, *, sign: int
) -> None:
    """Computes (x1 * cos1 + sign * x2 * onto1, x2 * cos2 - sign * x1 * onto2)."""
    x = x.to(cos.dtype)
    x1, x2 = x.chunk(2, -1)
    both = x * cos
    out1, out2 = both.chunk(2, -1)
    out1.addcmul_(x2, onto1, value=sign)
    out2.addcmul_(x1, onto2, value=-sign)
    out.copy_(both)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gives x rotated, as one expression that autograd and compilers see through.

    Args:
        x: `(total, heads, head_dim)`.
        cos: `(total, head_dim)`.
        sin: `(total, head_dim)`.

    Returns:
        `(total, heads, head_dim)` in x's dtype.
    """
    wide = _computed_in(x)
    x1, x2 = x.to(wide).chunk(2, -1)
    cos1, cos2 = cos.to(wide).unsqueeze(1).chunk(2, -1)  # (n, 1, d / 2)
    sin1, sin2 = sin.to(wide).unsqueeze(1).chunk(2, -1)
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2), -1).to(x.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
