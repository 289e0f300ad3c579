"""The RMS norms of a `generate` call, by torch's own kernel.

transformers writes a norm as seven operations. Each is a kernel of its own, and in a step of one
token a row they take the device longer than attention does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padless.environment import has_fused_rms_norm
from padless.unpadded.fused import Fusion, is_stock

# transformers computes norms of float64 in float32, torch in float64.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_fusable(module: Any) -> bool:
    """Whether a module is a norm whose forward torch's kernel may take over.

    Args:
        module: any.
    """
    if not is_stock(module, "LlamaRMSNorm"):
        return False
    weight = module.weight
    # Sharded and quantised weights are of other classes.
    return (
        type(weight) is nn.Parameter
        and weight.dtype in _DTYPES
        and has_fused_rms_norm(weight.device.type)
    )


def normalise(norm: Any, hidden_states: Tensor) -> Tensor | None:
    """Normalises by torch's kernel.

    Args:
        norm: a `LlamaRMSNorm`.
        hidden_states: `(..., hidden_size)`.

    Note:
        transformers computes in float32, rounds to the input's dtype and multiplies by the weight,
        which rounds again. torch's kernel multiplies in float32 and rounds once: in half precision
        it is one rounding nearer to the formula, in float32 the same up to the order of a sum.
    """
    weight: Tensor = norm.weight
    # A weight of another dtype promotes the output; torch has no kernel for it either.
    if hidden_states.dtype != weight.dtype:
        return None
    return F.rms_norm(hidden_states, weight.shape, weight, norm.variance_epsilon)


NORM = Fusion(is_fusable, normalise)
