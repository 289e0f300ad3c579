"""The MLPs of a `generate` call: their three products, and one kernel between them.

transformers writes what is between the products as two operations, with a round trip to memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from padless.kernels.silu_mul import reject_silu_mul, silu_mul
from padless.unpadded.fused import Fusion, is_stock
from padless.unpadded.projections import is_plain


def is_fusable(module: Any) -> bool:
    """Whether a module is an MLP between whose products the kernel may compute.

    Args:
        module: any.
    """
    if not is_stock(module, "LlamaMLP") or not _is_silu(module.act_fn):
        return False
    if getattr(module.config, "pretraining_tp", 1) > 1:
        # Products in slices, in transformers that has them.
        return False
    products = (module.gate_proj, module.up_proj, module.down_proj)
    # Sharded and quantised weights are of other classes.
    if not all(is_plain(layer) and type(layer.weight) is nn.Parameter for layer in products):
        return False
    weight = module.gate_proj.weight
    return reject_silu_mul(weight.device, weight.dtype) is None


def _is_silu(function: Any) -> bool:
    kind = type(function)
    name = (kind.__module__, kind.__qualname__)
    is_known = kind is nn.SiLU or name == ("transformers.activations", "SiLUActivation")
    if not is_known or "forward" in vars(function):
        return False
    if getattr(kind.forward, "__globals__", {}).get("__name__") != kind.__module__:
        return False
    return not (function._forward_hooks or function._forward_pre_hooks)


def compute(mlp: Any, hidden_states: Tensor) -> Tensor:
    """Computes an MLP, its products as the modules that they are.

    Args:
        mlp: a `LlamaMLP`.
        hidden_states: `(..., hidden_size)`.
    """
    out: Tensor = mlp.down_proj(silu_mul(mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)))
    return out


MLP = Fusion(is_fusable, compute)
