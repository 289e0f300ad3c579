"""From the arguments of a padded call to those of the flat one, or the reason to leave it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from padless.environment import is_capturing, is_tracing
from padless.errors import UnsupportedError
from padless.hf.eras import Era
from padless.kernels.unpad import FlatTokens
from padless.layout import VarlenLayout
from padless.unpadded.batch import FlatBatch
from padless.unpadded.ledger import Ledger
from padless.unpadded.prompts import Prompt
from padless.unpadded.sharding import shard_call, whole_reason
from padless.unpadded.structure import Structure, flatten_labels, read_structure

# What says where documents are; transformers' names, and a layout made beforehand.
PACKING = ("layout", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_BOUNDARIES = PACKING[:3]
PER_TOKEN = ("labels", "shift_labels")
# The number of each token's document, which stands beside the boundaries for layers that LLaMA has
# not (short convolutions).
_DOCUMENT = "seq_idx"
# Caches whose slots are the tokens in their order, one each.
_PLAIN_CACHES = ("DynamicCache", "StaticCache")
DECODING = "a call behind a cache"


def flatten_call(
    model: Any,
    arguments: dict[str, Any],
    ledger: Ledger,
    era: Era,
    whole: str | None = None,
) -> FlatBatch | None:
    """Flattens a call of a padded batch in place, and keeps this rank's part where ranks share it.

    Args:
        model: the `LlamaModel`.
        arguments: by name; on success those of the flat call, without `attention_mask`.
        ledger: where to count what is left to the stock path, and which backend to take.
        era: of the installed transformers.
        whole: why ranks must not share it; None if they may.

    Returns:
        The batch; None if the call has to take the stock path.

    Raises:
        TypeError: a layout is not a VarlenLayout.
        ValueError: boundaries that do not fit the batch.
        UnsupportedError: boundaries that the stock path would not keep.
    """
    source = arguments.get("input_ids")
    if source is None:
        source = arguments.get("inputs_embeds")
    if not isinstance(source, Tensor) or source.dim() < 2 or source.shape[1] == 0:
        # Not a call that transformers would take either; it says why.
        return None
    reason = _stock_reason(model, arguments, source, era)
    if reason is None:
        found = _read(source, arguments)
        if found.layout is not None:
            batch = _flat(model, source, arguments, found, ledger.backend)
            if ledger.sequence is not None:
                whole = whole or whole_reason(arguments)
                if whole is None:
                    batch.shard = shard_call(arguments, batch, ledger.sequence, model)
                    batch.position_ids = arguments["position_ids"]
                else:
                    ledger.count_whole(whole)
            return batch
        reason = found.reason
        ledger.count_syncs(found.host_syncs)
    leave_to_stock(reason, arguments, ledger)
    return None


def flatten_prompt(
    model: Any, arguments: dict[str, Any], backend: str, era: Era, prompt: Prompt
) -> FlatBatch | None:
    """Flattens a prompt whose rows are one sequence each, in place; counts nothing.

    Args:
        model: the `LlamaModel`.
        arguments: by name, as for `flatten_call`.
        backend: of `varlen_attention`.
        era: of the installed transformers.
        prompt: what is known of the arguments, which then need not be looked through for it.

    Returns:
        The batch; None if `flatten_call` would not flatten it, or into more sequences than rows.
    """
    source = arguments.get("input_ids")
    if source is None:
        source = arguments["inputs_embeds"]
    if _stock_reason(model, arguments, source, era) is not None:
        return None
    known = {"position_ids": prompt.counts_tokens, "attention_mask": prompt.hides_nothing}
    asked = {name: None if known.get(name) else value for name, value in arguments.items()}
    found = _read(source, asked)
    if found.layout is None or len(found.layout.lengths) != source.shape[0]:
        return None
    return _flat(model, source, arguments, found, backend)


def leave_to_stock(reason: str, arguments: dict[str, Any], ledger: Ledger) -> None:
    """Counts a call that the stock path is to serve.

    Raises:
        UnsupportedError: the call has boundaries, which that path would not keep.
    """
    given = [name for name in _BOUNDARIES if arguments.get(name) is not None]
    if given and reason != DECODING:
        raise UnsupportedError(
            f"{reason} takes transformers' own path, which would let the documents of "
            f"{given[0]} see each other; leave it out, or call the model on each document"
        )
    ledger.count_stock(reason, is_usual=reason == DECODING)


def _stock_reason(model: Any, arguments: dict[str, Any], source: Tensor, era: Era) -> str | None:
    """Says why a call is left to the stock path, as far as its arguments tell; None if not."""
    config = model.config
    past = arguments.get("past_key_values")
    if past is not None or era.cache_attribute:
        reason = _cache_reason(model, past, era)
        if reason is not None:
            return reason
    asked = arguments.get("output_attentions")
    if asked or (asked is None and getattr(config, "output_attentions", False)):
        return "output_attentions"
    if era.name in ("K", "L") and config.use_return_dict is False:
        # Then even an explicit return_dict=True gives a tuple.
        return "return_dict=False in the config"
    if model.training and _attention_dropout(model):
        return "attention dropout"
    if arguments.get("is_causal") is False:
        return "is_causal=False"
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == source.shape[:2]):
        return "an attention_mask that is not (batch, seqlen)"
    if mask is not None and mask.is_floating_point():
        return "a floating attention_mask"
    position_ids = arguments.get("position_ids")
    if position_ids is not None and not _fits(position_ids, source):
        return "position_ids that are not (batch, seqlen)"
    if arguments.get("ignore_index", -100) != -100:
        return "an ignore_index of its own"
    if source.device.type == "meta" or is_tracing() or is_capturing(source):
        return "tracing or capturing"
    return _unknown_reason(arguments)


def _attention_dropout(model: Any) -> float:
    # Of the layers, as they read it; the config has it since 4.36.
    attention = getattr(next(iter(model.layers), None), "self_attn", None)
    return float(getattr(attention, "attention_dropout", 0.0))


def _unknown_reason(arguments: dict[str, Any]) -> str | None:
    known = {
        *PACKING, *PER_TOKEN, _DOCUMENT, "input_ids", "inputs_embeds", "attention_mask",
        "position_ids", "past_key_values", "cache_position", "num_items_in_batch",
    }  # fmt: skip
    for name, value in arguments.items():
        if name not in known and isinstance(value, Tensor) and value.dim() > 0:
            return f"the argument {name}"
    return None


def _cache_reason(model: Any, past: Any, era: Era) -> str | None:
    if era.cache_attribute and any(
        getattr(layer.self_attn, "past_key_value", None) is not None for layer in model.layers
    ):
        # 4.38 to 4.40 hang a static cache on the layers.
        return "a static cache on the layers"
    if past is None:
        return None
    if isinstance(past, (tuple, list)):
        return DECODING if len(past) else None
    if type(past).__name__ not in _PLAIN_CACHES:
        return f"a {type(past).__name__}"
    return DECODING if int(past.get_seq_length()) else None


def _fits(position_ids: Any, source: Tensor) -> bool:
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
        return False
    batch, seqlen = source.shape[:2]
    return position_ids.shape in ((batch, seqlen), (1, seqlen))


def _read(source: Tensor, arguments: dict[str, Any]) -> Structure:
    cu_seqlens, cu_seqlens_k = (arguments.get(name) for name in _BOUNDARIES[1:])
    layout = arguments.get("layout")
    if layout is not None and not isinstance(layout, VarlenLayout):
        raise TypeError(
            f"layout must be a VarlenLayout, got {type(layout).__name__}; "
            f"build one with VarlenLayout.from_lengths or .from_mask"
        )
    return read_structure(
        source.shape[0],
        source.shape[1],
        source.device,
        key_padding_mask=arguments.get("attention_mask"),
        position_ids=arguments.get("position_ids"),
        cu_seqlens=cu_seqlens_k if cu_seqlens is None else cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        layout=layout,
        input_ids=arguments.get("input_ids"),
        labels=arguments.get("labels"),
        shift_labels=arguments.get("shift_labels"),
    )


def _flat(
    model: Any, source: Tensor, arguments: dict[str, Any], found: Structure, backend: str
) -> FlatBatch:
    """Replaces the arguments of the padded call by those of the flat one."""
    layout = found.layout
    assert layout is not None
    embed = model.embed_tokens
    if arguments.get("input_ids") is not None and (
        embed._forward_hooks or embed._forward_pre_hooks
    ):
        # A hook on the embedding (NEFTune's noise) may depend on the padded shape.
        arguments["inputs_embeds"] = embed(arguments.pop("input_ids"))
    positions = arguments.get("position_ids")
    if positions is not None:
        positions = positions.to(source.device).expand(source.shape[:2])
    tokens = found.tokens
    if tokens is None:
        tokens = _tokens(layout, positions, arguments, source.device)
    elif positions is not None:
        # Kernels count slots.
        tokens = replace(tokens, positions=layout.unpad(positions).long())
    made = {name: getattr(tokens, name) for name in ("input_ids", *PER_TOKEN)}
    if arguments.get("inputs_embeds") is not None:
        made["inputs_embeds"] = layout.unpad(arguments["inputs_embeds"])
    for name, tensor in made.items():
        if arguments.get(name) is not None:
            arguments[name] = tensor.unsqueeze(0)
    for name in (*PACKING, _DOCUMENT, "cache_position", "attention_mask"):
        arguments.pop(name, None)
    arguments["position_ids"] = tokens.positions.unsqueeze(0)
    return FlatBatch(layout, arguments["position_ids"], backend, found.host_syncs)


def _tokens(
    layout: VarlenLayout, positions: Tensor | None, arguments: dict[str, Any], device: torch.device
) -> FlatTokens:
    """Makes by torch's operations what the kernels make where they serve."""
    if positions is not None:
        positions = layout.unpad(positions).long()
    elif layout.indices is not None:
        positions = layout.indices % layout.seqlen
    else:
        positions = torch.arange(layout.seqlen, device=device).repeat(layout.batch)
    ids, labels, shift_labels = (arguments.get(name) for name in ("input_ids", *PER_TOKEN))
    return FlatTokens(
        positions,
        None if ids is None else layout.unpad(ids),
        None if labels is None else flatten_labels(layout, labels.to(device))[0],
        None if shift_labels is None else layout.unpad(shift_labels.to(device)),
    )
