"""q, k and v of an attention layer: three products, whose gradients are added inside a product.

Autograd adds the three gradients of the layer's input by two kernels of their own, which read and
write `(total, hidden_size)` five times more than there is need for. The forward, the modules and
their weights stay as they are; what is not three plain products is called as modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from padless.environment import autocasts, is_compiling, is_tracing

# A LlamaAttention of some transformers version.
Layer = Any


def project(module: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes q, k and v, as the layer's modules do.

    Args:
        module: the attention layer.
        hidden: `(1, total, hidden_size)`.

    Returns:
        `(1, total, num_heads * head_dim)`, and twice `(1, total, num_kv_heads * head_dim)`.
    """
    layers = (module.q_proj, module.k_proj, module.v_proj)
    if _may_join(layers, hidden):
        # From v to q, as autograd comes to three products: ZeRO-2 fills buckets in the order in
        # which gradients arrive, and needs the same one on ranks whose batch runs otherwise.
        q, k, v = _Projections.apply(hidden, *(layer.weight for layer in reversed(layers)))
        return q, k, v
    # As modules, so that LoRA, hooks and quantised layers stay in effect.
    q, k, v = (layer(hidden) for layer in layers)
    return q, k, v


def is_plain(layer: nn.Module) -> bool:
    """Whether a projection is torch's own product, and nobody else looks at what it returns."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    # Backward hooks sit on a view of the output, which a write to its base would leave behind.
    return bool(layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _may_join(layers: tuple[nn.Module, ...], hidden: Tensor) -> bool:
    if not (torch.is_grad_enabled() and hidden.requires_grad) or type(hidden) is not Tensor:
        return False
    if is_compiling() or is_tracing() or autocasts(hidden) or _has_global_hooks():
        return False
    return all(
        is_plain(layer)
        and not layer._forward_pre_hooks
        and layer.bias is None
        # Sharded and quantised weights are of other classes.
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == hidden.dtype
        and layer.weight.device == hidden.device
        for layer in layers
    )


def _has_global_hooks() -> bool:
    return bool(
        torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


class _Projections(torch.autograd.Function):
    """Three products of one input; backward adds up the input's gradient in place."""

    # Without `setup_context`, for which torch reads a function's signature at every call.
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, v_weight: Tensor, k_weight: Tensor, q_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden, v_weight, k_weight, q_weight)
        ctx.set_materialize_grads(False)
        q, k, v = (F.linear(hidden, weight) for weight in (q_weight, k_weight, v_weight))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, *weights = ctx.saved_tensors
        rows = hidden.reshape(-1, hidden.shape[-1])
        dhidden: Tensor | None = None
        dweights: list[Tensor | None] = []
        for number, (grad, weight) in enumerate(zip(grads[::-1], weights, strict=True), start=1):
            if grad is None:
                dweights.append(None)
                continue
            grad = grad.reshape(-1, grad.shape[-1])
            dweights.append(grad.t() @ rows if ctx.needs_input_grad[number] else None)
            if ctx.needs_input_grad[0]:
                # In place: out of place the sum so far would be copied first.
                dhidden = grad @ weight if dhidden is None else dhidden.addmm_(grad, weight)
        return None if dhidden is None else dhidden.view(hidden.shape), *dweights
