"""One call of a LLaMA attention layer, the same on every transformers version.

Projects, rotates, keeps the cache, and returns what the caller unpacks. What attends in between is
`padless.llama`'s.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from padless.errors import UnsupportedError
from padless.hf.call import Layer, LayerCall, is_preallocated, modeling_llama, seen_tokens
from padless.hf.masks import LayerMask

# Tables for modules that have lost their own (4.48 and later) and are called without any.
_rotary_tables: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Projected:
    """Rotated queries, all keys and values of the call, and the cache to return.

    Attributes:
        q: `(batch, num_heads, seqlen_q, head_dim)`.
        k: `(batch, num_kv_heads, seqlen_k, head_dim)`, cached keys first.
        v: like k.
        present: what the call returns as its cache.
        mask: the mask of these queries and keys.
        softmax_scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    present: Any
    mask: LayerMask
    softmax_scale: float


def project(module: Layer, call: LayerCall) -> Projected:
    """Projects, rotates and caches; reads the mask.

    Raises:
        TypeError: the mask's dtype means nothing.
        ValueError: the mask's shape fits nothing.
    """
    hidden = call.hidden_states
    batch, seqlen_q, _ = hidden.shape
    heads = (batch, seqlen_q, -1, module.head_dim)
    # The projections are called as modules, also under pretraining_tp: LoRA, hooks and quantised
    # layers stay in effect, and slicing a product computes nothing else than the product.
    q = module.q_proj(hidden).view(heads).transpose(1, 2)  # (b, h, s, d)
    k = module.k_proj(hidden).view(heads).transpose(1, 2)
    v = module.v_proj(hidden).view(heads).transpose(1, 2)
    projected_dtype = v.dtype
    mask = None
    if not is_preallocated(call.past):
        # Read before the cache grows: a mask that is refused must leave the cache as it was.
        seqlen_k = seen_tokens(module, call) + seqlen_q
        mask = _read_mask(call, call.attention_mask, q, seqlen_k, is_aligned=True)
    q, k, cos, sin = _rotate(module, call, q, k, v)
    k, v, present = _update_cache(module, call, k, v, cos, sin)
    if mask is None:
        k, v, raw, is_aligned = _cut_preallocated(module, call, k, v)
        mask = _read_mask(call, raw, q, k.shape[2], is_aligned=is_aligned)
    elif mask.shape[3] != k.shape[2]:
        # A cache that forgets (a window) hands out fewer keys than it has seen.
        mask = _read_mask(call, call.attention_mask, q, k.shape[2], is_aligned=False)
    # Float32 norms or rotary tables promote q and k; values still have the projection's dtype.
    q, k, v = (x.to(projected_dtype) for x in (q, k, v))
    scale = getattr(module, "scaling", None) or module.head_dim**-0.5
    return Projected(q, k, v, present, mask, float(scale))


def finish(
    module: Layer, call: LayerCall, out: Tensor, weights: Tensor | None, present: Any
) -> tuple[Any, ...]:
    """Applies the output projection and returns what the caller unpacks.

    Args:
        module: the attention layer.
        call: the call.
        out: `(batch, seqlen, num_heads, head_dim)`.
        weights: `(batch, num_heads, seqlen_q, seqlen_k)` or None.
        present: the cache.

    Returns:
        `(output, weights, cache)`; without the cache for decoder layers that unpack two.
    """
    batch, seqlen = out.shape[:2]
    output = module.o_proj(out.reshape(batch, seqlen, -1))
    if call.by_decoder_layer and call.era.returned == 2:
        return output, weights
    return output, weights, present


def _rotate(
    module: Layer, call: LayerCall, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Applies the rotary embedding with transformers' own function and tables."""
    apply = modeling_llama().apply_rotary_pos_emb
    if call.position_embeddings is not None:
        cos, sin = call.position_embeddings
        return (*apply(q, k, cos, sin), cos, sin)
    seen = seen_tokens(module, call)
    position_ids = call.position_ids
    if position_ids is None:
        position_ids = torch.arange(seen, seen + q.shape[2], device=q.device).unsqueeze(0)
    if call.era.rotary == "seq_len":
        cos, sin = module.rotary_emb(v, seq_len=seen + k.shape[2])
        return (*apply(q, k, cos, sin, position_ids), cos, sin)
    table = module.rotary_emb if call.era.rotary == "position_ids" else _rotary_table(module)
    cos, sin = table(v, position_ids)
    return (*apply(q, k, cos, sin), cos, sin)


def _rotary_table(module: Layer) -> nn.Module:
    if module not in _rotary_tables:
        table = modeling_llama().LlamaRotaryEmbedding(config=module.config)
        _rotary_tables[module] = table.to(module.q_proj.weight.device)
    return _rotary_tables[module]


def _read_mask(
    call: LayerCall, raw: Tensor | None, q: Tensor, seqlen_k: int, *, is_aligned: bool
) -> LayerMask:
    return LayerMask(
        raw,
        batch=q.shape[0],
        num_heads=q.shape[1],
        seqlen_q=q.shape[2],
        seqlen_k=seqlen_k,
        is_causal=call.is_causal,
        cache_position=call.cache_position,
        is_aligned=is_aligned,
        device=q.device,
        boundaries=call.boundaries,
    )


def _update_cache(
    module: Layer, call: LayerCall, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Any]:
    past = call.past
    if past is None:
        return k, v, (k, v) if call.use_cache else None
    if isinstance(past, (tuple, list)):
        k = torch.cat([past[0], k], dim=2)
        v = torch.cat([past[1], v], dim=2)
        return k, v, (k, v) if call.use_cache else None
    if getattr(module, "layer_idx", 0) is None:
        raise UnsupportedError(
            f"a cache needs to know its layer, got {type(module).__name__} with layer_idx None; "
            f"pass layer_idx when building the layer"
        )
    details = {"sin": sin, "cos": cos, "cache_position": call.cache_position}
    k, v = past.update(k, v, module.layer_idx, details)
    return k, v, past


def _cut_preallocated(
    module: Layer, call: LayerCall, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Leaves out the empty slots of a preallocated cache where the mask does not hide them.

    Returns:
        k, v, the mask for them, and whether the last key is the last query's own.
    """
    raw = call.attention_mask
    if raw is not None and raw.dim() == 4:
        # Such a mask hides the empty slots itself, and to count them would synchronise.
        return k, v, raw, False
    if call.cache_position is not None:
        n = int(call.cache_position[-1]) + 1
    else:
        n = int(call.past.get_seq_length(module.layer_idx))
    return k[:, :, :n], v[:, :, :n], None if raw is None else raw[:, :n], True
