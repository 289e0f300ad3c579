"""silu(gate) * up in one Triton kernel.

Importing this module imports Triton: `padless.kernels.silu_mul` does so when a CUDA tensor comes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padless.kernels.launch import on_device

# Numbers of a program: 4 warps at 8 a thread, one vector load of half precision from each side. A
# step of 16 rows, 14336 wide, then is 224 programs, more than a large GPU has processors.
_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Computes a block of one row. Grid: (rows, blocks of a row).

    The number of rows is no argument, so that no number of them compiles anything; the width is
    compiled in, so that loads are vectors where it allows them.
    """
    # Offsets are int64: a prompt may have more than 2^31 numbers.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = row * WIDTH + cols
    within = cols < WIDTH
    gate = tl.load(gate_ptr + places, mask=within, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=within, other=0.0)
    # Rounded in between, as torch's two operations are.
    silu = (gate / (1 + tl.exp(-gate))).to(up.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + places, product, mask=within)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Writes silu(gate) * up into out; launches one kernel.

    Args:
        gate: `(..., width)`, float16 or bfloat16, contiguous.
        up: shape and dtype of gate, contiguous.
        out: likewise.
    """
    width = gate.shape[-1]
    if gate.numel() == 0:
        return
    # Triton launches on the current device, which need not be the tensors'.
    with on_device(gate.device):
        _silu_mul_kernel[(gate.numel() // width, triton.cdiv(width, _BLOCK))](
            gate, up, out, WIDTH=width, BLOCK=_BLOCK, num_warps=4
        )
