"""What a decoder layer, or a caller of the original's signature, hands to attention."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from padless.hf.eras import Era, installed_era

# A LlamaAttention of some transformers version: its attributes are not the same in all of them.
Layer = Any


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
        boundaries: where packed documents begin, as cu_seqlens or as position_ids that restart.
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
    boundaries: Tensor | None
    by_decoder_layer: bool
    era: Era


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
        boundaries=_boundaries(module, position_ids, extra),
        by_decoder_layer=position_embeddings is not None or era.returned == 3,
        era=era,
    )


def _boundaries(module: Layer, position_ids: Tensor | None, extra: dict[str, Any]) -> Tensor | None:
    """Finds what says that rows hold several documents.

    Boundaries that are handed over are kept by every implementation: to ignore them, as stock SDPA
    does, is a leak. Positions that restart mean documents to the flash implementations alone.
    """
    if extra.get("cu_seq_lens_q") is not None:
        return extra["cu_seq_lens_q"]
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    return position_ids if "flash" in implementation else None


def seen_tokens(module: Layer, call: LayerCall) -> int:
    """Counts the tokens that the cache holds before this call."""
    past = call.past
    if past is None:
        return 0
    if isinstance(past, (tuple, list)):
        return int(past[0].shape[-2])
    if hasattr(past, "get_usable_length") and call.era.rotary == "seq_len":
        return int(past.get_usable_length(call.hidden_states.shape[1], module.layer_idx))
    return int(past.get_seq_length(module.layer_idx))


def is_preallocated(past: Any) -> bool:
    """Whether a cache hands out all its slots, filled or not (a static cache)."""
    if past is None or isinstance(past, (tuple, list)):
        return False
    # By name: the class is not there before 4.38, and newer versions flag what is like it.
    named = any(base.__name__ == "StaticCache" for base in type(past).__mro__)
    return named or bool(getattr(past, "is_compileable", False))
