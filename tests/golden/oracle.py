"""A LLaMA from its definition, independent of transformers.

In float64 it is the truth of these tests; its attention layer in float32 is a baseline of rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.reference import reference_attention

_THETA = 10000.0


def rope(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotates `(batch, seqlen, heads, head_dim)` by `(batch or 1, seqlen)` positions, in halves."""
    half = x.shape[-1] // 2
    inv_freq = _THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = position_ids.to(torch.float64)[..., None] * inv_freq  # (b, s, half)
    cos, sin = (t.to(x.dtype)[:, :, None] for t in (angle.cos(), angle.sin()))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_visible_keys(real: Tensor) -> Tensor:
    """Builds `(batch, 1, seqlen, seqlen)` from `(batch, seqlen)`: causal, and the key is real."""
    seqlen = real.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    return causal & real[:, None, None, :]


def attention_layer(
    weights: dict[str, Tensor],
    hidden: Tensor,
    visible: Tensor,
    position_ids: Tensor,
    head_dim: int,
) -> Tensor:
    """Computes one attention layer from its projection weights, `(batch, seqlen, hidden_size)`."""
    heads = (*hidden.shape[:2], -1, head_dim)
    q, k, v = (
        F.linear(hidden, weights[f"{n}_proj.weight"], weights.get(f"{n}_proj.bias")).view(heads)
        for n in "qkv"
    )
    q, k = rope(q, position_ids), rope(k, position_ids)
    out = reference_attention(q, k, v, visible=visible).flatten(2)
    return F.linear(out, weights["o_proj.weight"], weights.get("o_proj.bias"))


def logits(
    weights: dict[str, Tensor],
    ids: Tensor,
    real: Tensor,
    *,
    head_dim: int,
    num_layers: int,
    eps: float,
    position_ids: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Computes a LlamaForCausalLM's logits `(batch, seqlen, vocab)` from its float64 weights."""
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1])[None]
    if visible is None:
        visible = causal_visible_keys(real)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name]

    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        own = {k[len(layer) + 10 :]: w for k, w in weights.items() if k.startswith(layer + "self_")}
        x = x + attention_layer(
            own, norm(x, layer + "input_layernorm.weight"), visible, position_ids, head_dim
        )
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(h, weights[layer + "mlp.gate_proj.weight"]))
        up = F.linear(h, weights[layer + "mlp.up_proj.weight"])
        x = x + F.linear(gate * up, weights[layer + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), weights["lm_head.weight"])


def layer_truth(layer: torch.nn.Module, hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Computes a transformers attention layer by this file: in float32, and in float64."""
    positions = torch.arange(hidden.shape[1])[None]
    baseline, truth = (
        attention_layer(
            {name: weight.detach().to(dtype) for name, weight in layer.named_parameters()},
            hidden.to(dtype),
            visible,
            positions,
            layer.head_dim,
        )
        for dtype in (torch.float32, torch.float64)
    )
    return baseline, truth
