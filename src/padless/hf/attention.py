"""One call of a LLaMA attention layer, the same on every transformers version.

Reads what a decoder layer (or a caller of the original's signature) hands over, projects, rotates,
keeps the cache, and returns what the caller unpacks. What attends in between is `padless.llama`'s.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from padless.errors import UnsupportedError
from padless.hf.eras import Era, installed_era
from padless.hf.masks import LayerMask

# A LlamaAttention of some transformers version: its attributes are not the same in all of them.
Layer = Any

# Tables for modules that have lost their own (4.48 and later) and are called without any.
_rotary_tables: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LayerCall:
    """What one call asks for, whatever the version names it.

    Attributes:
        hidden_states: `(batch, seqlen, hidden_size)`.
        attention_mask: as it came.
        position_ids: int `(batch or 1, seqlen)` or None.
        past: None, a `(k, v)` tuple, or a transformers Cache.
        output_attentions: whether the weights are wanted.
        use_cache: whether keys and values are wanted back.
        position_embeddings: `(cos, sin)` or None.
        cache_position: int `(seqlen,)` or None.
        is_causal: whether a missing mask means causal.
        by_decoder_layer: called by a decoder layer rather than by the original's signature.
        era: of the transformers in this process.
    """

    hidden_states: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past: Any
    output_attentions: bool
    use_cache: bool
    position_embeddings: tuple[Tensor, Tensor] | None
    cache_position: Tensor | None
    is_causal: bool
    by_decoder_layer: bool
    era: Era


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


def modeling_llama() -> ModuleType:
    """Imports `transformers.models.llama.modeling_llama`."""
    return importlib.import_module("transformers.models.llama.modeling_llama")


def stock_reason(module: Layer, attention_mask: Any) -> str | None:
    """Says why a call belongs to the stock path; None if padless serves it.

    A mask that is no tensor (flex attention's) and caches that are paged belong to implementations
    with rules of their own.
    """
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    ours = implementation in ("eager", "sdpa") or "flash" in implementation
    if not ours or "paged" in implementation:
        return f"attention implementation {implementation!r}"
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return f"attention_mask of type {type(attention_mask).__name__}"
    return None


def read_call(
    module: Layer,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_value: Any,
    output_attentions: bool,
    use_cache: bool,
    extra: dict[str, Any],
) -> LayerCall:
    """Collects a call's arguments; names that mean nothing to attention are left alone.

    Raises:
        TypeError: hidden_states is not a floating tensor.
        ValueError: hidden_states is not `(batch, seqlen, hidden_size)` or holds no token.
        UnsupportedError: transformers is older than all eras.
    """
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        came = getattr(hidden_states, "dtype", type(hidden_states).__name__)
        raise TypeError(f"hidden_states must be a floating tensor, got {came}")
    if hidden_states.dim() != 3 or hidden_states.shape[1] == 0 or hidden_states.shape[0] == 0:
        raise ValueError(
            f"hidden_states must have shape (batch, seqlen, hidden_size) with at least one token, "
            f"got {tuple(hidden_states.shape)}"
        )
    era = installed_era()
    past = extra.get("past_key_values", past_key_value)
    if past is None:
        past = past_key_value
    if era.cache_attribute and getattr(module, "past_key_value", None) is not None:
        # 4.38 to 4.40 hang a static cache on the module, and it wins over the argument.
        past = module.past_key_value
    is_causal = extra.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    position_embeddings = extra.get("position_embeddings")
    return LayerCall(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past=past,
        output_attentions=bool(output_attentions),
        use_cache=bool(use_cache),
        position_embeddings=position_embeddings,
        cache_position=extra.get("cache_position"),
        is_causal=bool(is_causal),
        by_decoder_layer=position_embeddings is not None or era.returned == 3,
        era=era,
    )


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
    if not _is_preallocated(call.past):
        # Read before the cache grows: a mask that is refused must leave the cache as it was.
        seqlen_k = _seen_tokens(module, call) + seqlen_q
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
    seen = _seen_tokens(module, call)
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


def _seen_tokens(module: Layer, call: LayerCall) -> int:
    past = call.past
    if past is None:
        return 0
    if isinstance(past, (tuple, list)):
        return int(past[0].shape[-2])
    if hasattr(past, "get_usable_length") and call.era.rotary == "seq_len":
        return int(past.get_usable_length(call.hidden_states.shape[1], module.layer_idx))
    return int(past.get_seq_length(module.layer_idx))


def _is_preallocated(past: Any) -> bool:
    """Whether a cache hands out all its slots, filled or not (a static cache)."""
    if past is None or isinstance(past, (tuple, list)):
        return False
    # By name: the class is not there before 4.38, and newer versions flag what is like it.
    named = any(base.__name__ == "StaticCache" for base in type(past).__mro__)
    return named or bool(getattr(past, "is_compileable", False))


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
