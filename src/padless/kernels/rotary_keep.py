"""`rotate_and_keep`: the rotary embedding of a decoding step, whose keys and values go to a cache.

Owns the choice of what does it. The kernel is in `rotary_keep_triton`; where it does not serve, the
caller rotates by `apply_rotary` and copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padless.environment import is_compiling, is_tracing
from padless.kernels import rotary_torch
from padless.kernels.launch import are_plain, is_gpu
from padless.kernels.trial import faults_by

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotate_and_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    slots: Tensor,
) -> bool:
    """Rotates q in place, and puts k rotated and v as it is into slots, by one kernel.

    Args:
        q: `(rows, num_heads, head_dim)`, which nobody else reads.
        k: `(rows, num_kv_heads, head_dim)`.
        v: like k.
        cos: `(1, rows, head_dim)`, as for `apply_rotary`.
        sin: like cos.
        k_slots: `(slots, num_kv_heads, head_dim)`.
        v_slots: like k_slots.
        slots: int64 `(rows,)`, of each row's token; no two alike.

    Returns:
        Whether it has; nothing is written otherwise.
    """
    if not _serves(q, k, v, cos, sin, k_slots, v_slots, slots):
        return False
    from padless.kernels import rotary_keep_triton  # imports Triton

    rotary_keep_triton.rotate_and_keep(q, k, v, cos, sin, k_slots, v_slots, slots)
    return True


def _serves(*given: Tensor) -> bool:
    if is_compiling() or is_tracing() or torch.is_grad_enabled():
        return False
    q, k, v, cos, sin, k_slots, v_slots, slots = given
    if not are_plain(given, q.device):
        return False
    rows, _, head_dim = q.shape
    fits = k.shape == v.shape == (rows, k_slots.shape[1], head_dim)
    fits = fits and cos.shape == sin.shape == (1, rows, head_dim) and head_dim % 2 == 0
    fits = fits and k_slots.shape == v_slots.shape and slots.shape == (rows,)
    # Float32 norms promote q and k, which are rounded once they are rotated.
    alike = {x.dtype for x in (q, k, v, k_slots, v_slots)} == {q.dtype} and q.dtype in _DTYPES
    return fits and alike and is_gpu(q.device) and _fault(q.device) is None


def _try(device: torch.device) -> None:
    """Rotates and keeps a few numbers by the kernel; raises if they are wrong."""
    from padless.kernels import rotary_keep_triton

    numbers = torch.linspace(-1, 1, 160, device=device)
    q, kv, tables = numbers[:64].view(2, 4, 8), numbers[64:128], numbers[128:].view(2, 1, 2, 8)
    k, v = kv.view(2, 2, 2, 8)
    cos, sin = tables
    want = [rotary_torch.rotated(x, cos[0], sin[0]) for x in (q, k)]
    k_slots, v_slots = numbers.new_zeros(2, 5, 2, 8)
    slots = torch.tensor([3, 1], device=device)
    q = q.clone()
    rotary_keep_triton.rotate_and_keep(q, k, v, cos, sin, k_slots, v_slots, slots)
    torch.testing.assert_close(q, want[0])
    torch.testing.assert_close(k_slots.index_select(0, slots), want[1])
    torch.testing.assert_close(v_slots.index_select(0, slots), v)
    free = torch.tensor([0, 2, 4], device=device)
    for kept in (k_slots, v_slots):
        torch.testing.assert_close(kept[free], torch.zeros_like(kept[free]))


_fault = faults_by(_try)
