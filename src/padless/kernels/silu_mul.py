"""`silu_mul`: silu(gate) * up, what an MLP of LLaMA computes between its products.

Owns the choice of what computes it. The kernel is in `silu_mul_triton`; its twin are torch's two
operations, which are what transformers runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.environment import is_compiling, is_tracing
from padless.kernels.launch import are_plain, is_gpu
from padless.kernels.trial import faults_by

# In float32 the kernel's exponential would be less exact than torch's; rounded to half precision
# they are alike.
_DTYPES = (torch.bfloat16, torch.float16)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) * up, by one kernel where it serves.

    Args:
        gate: floating, any shape.
        up: like gate.

    Returns:
        A new tensor. In half precision silu is computed in float32 and rounded, and so is the
        product: the roundings of the two operations, by kernel and by torch alike.

    Note:
        Differentiable; where autograd records, torch computes.
    """
    if not _serves(gate, up):
        return F.silu(gate) * up
    from padless.kernels import silu_mul_triton  # imports Triton

    out = torch.empty_like(gate)
    silu_mul_triton.silu_mul(gate, up, out)
    return out


def reject_silu_mul(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why the kernel does not serve; None if it does. Tries it once for each GPU.

    Args:
        device: of gate and up.
        dtype: of both.
    """
    if not is_gpu(device):
        return f"needs CUDA, got {device.type}"
    if dtype not in _DTYPES:
        return f"needs float16 or bfloat16, got {dtype}"
    return _fault(device)


def _serves(gate: Tensor, up: Tensor) -> bool:
    if is_compiling() or is_tracing():
        return False
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return False
    if not are_plain((gate, up), gate.device) or gate.dim() == 0:
        return False
    is_alike = (gate.shape, gate.dtype) == (up.shape, up.dtype)
    return is_alike and reject_silu_mul(gate.device, gate.dtype) is None


def _try(device: torch.device) -> None:
    """Computes a few numbers by the kernel; raises if they are wrong."""
    from padless.kernels import silu_mul_triton

    for dtype in _DTYPES:
        gate, up = torch.linspace(-9, 9, 160, device=device).to(dtype).view(2, 2, 40)
        out = torch.empty_like(gate)
        silu_mul_triton.silu_mul(gate, up, out)
        torch.testing.assert_close(out, F.silu(gate) * up)


_fault = faults_by(_try)
