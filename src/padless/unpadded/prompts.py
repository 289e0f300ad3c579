"""Which prompts `generate` may decode behind without padding, and which calls are its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from padless.generation.store import RaggedStore

# Then generate chooses by what the model computes at padding.
RIGHT_PADDING = "a prompt padded on the right"

# What a step may be given beside its tokens; a False or None says nothing.
_KNOWN = frozenset({
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position",
    "use_cache", "logits_to_keep", "num_logits_to_keep", "return_dict",
})  # fmt: skip


def prompt_reason(modules: Sequence[nn.Module], arguments: dict[str, Any]) -> str | None:
    """Says why a call's prompt is not one to decode behind; None if it is.

    Args:
        modules: of the language modelling head, itself first.
        arguments: of the prompt's forward.
    """
    cache = arguments.get("past_key_values")
    if cache is None and not arguments.get("use_cache"):
        return "without a cache"
    if torch.is_grad_enabled():
        return "gradients"
    return _cache_reason(cache) or _input_reason(modules, arguments)


def _cache_reason(cache: Any) -> str | None:
    if cache is None:
        # Of 5.0, where the model makes it.
        return None
    name = type(cache).__name__
    if name != "DynamicCache" or getattr(cache, "offloading", False):
        return f"a cache of another kind, {name}"
    if int(cache.get_seq_length()) or getattr(cache, "_is_user_defined", False):
        return "a cache that was there before"
    if any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
        return "a cache with a window"
    return None


def _input_reason(modules: Sequence[nn.Module], arguments: dict[str, Any]) -> str | None:
    for name, value in arguments.items():
        is_new = name not in _KNOWN and name != "inputs_embeds"
        if is_new and value is not None and value is not False:
            return f"the argument {name}"
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    if not isinstance(source, Tensor) or source.dim() < 2 or source.shape[1] == 0:
        return "no prompt"
    # Not by parameters(), which looks for those that are tied: a call of few tokens waits for this.
    held = (module._parameters.values() for module in modules)
    devices = {parameter.device for each in held for parameter in each if parameter is not None}
    if devices != {source.device} or source.device.type == "meta":
        return "a model or prompt on several devices"
    if modules[0].training and any(getattr(m, "gradient_checkpointing", False) for m in modules):
        return "checkpointing in training mode"
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != source.shape[:2]:
        return None if mask is None else "a mask that is not (batch, seqlen)"
    return None


class Prompt(NamedTuple):
    """What a prompt says beside its tokens.

    Attributes:
        ends_real: whether each row ends in a real token, from which its first new one follows.
        hides_nothing: whether there is a mask, and every slot of it is real.
        copies: how many neighbouring rows are alike.
        counts_tokens: whether positions are known to count the real tokens of each row from 0, as
            `generate` makes them of the mask.
    """

    ends_real: bool
    hides_nothing: bool
    copies: int
    counts_tokens: bool


def read_prompt(arguments: dict[str, Any], copies: int) -> Prompt:
    """Reads a prompt by one wait for the device.

    Args:
        arguments: of the prompt's forward.
        copies: neighbouring rows that `generate` has made of each row, as far as its options tell.
    """
    ids, mask, positions = (
        arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    facts: dict[str, Tensor] = {}
    if mask is not None:
        real = mask != 0
        facts["ends real"] = real[:, -1].all()
        if not mask.is_floating_point():
            facts["hides nothing"] = real.all()
        if positions is not None and positions.shape == mask.shape:
            facts["counts"] = ((positions == mask.cumsum(1) - 1) | ~real).all()
    elif positions is not None and positions.dim() == 2:
        # transformers leaves out a mask that hides nothing.
        slots = torch.arange(positions.shape[-1], device=positions.device)
        facts["counts"] = (positions == slots).all()
    rows = [x for x in (ids, mask, positions) if x is not None]
    may_be_copies = copies > 1 and ids is not None and len(ids) % copies == 0
    if may_be_copies and len({len(x) for x in rows}) == 1:
        grouped = [x.unflatten(0, (-1, copies)) for x in rows]
        facts["copies"] = torch.stack([(x == x[:, :1]).all() for x in grouped]).all()
    answers = torch.stack([*facts.values()]).tolist() if facts else []
    found = dict(zip(facts, answers, strict=True))
    return Prompt(
        ends_real=found.get("ends real", True),
        hides_nothing=found.get("hides nothing", False),
        copies=copies if found.get("copies", False) else 1,
        counts_tokens=found.get("counts", False),
    )


def step_reason(
    arguments: dict[str, Any], store: RaggedStore, *, rows: int, has_mask: bool
) -> str | None:
    """Says why a forward behind the cache is not its next step; None if it is."""
    ids = arguments.get("input_ids")
    if ids is None or ids.shape != (rows, 1):
        return "not one token a row behind the cache"
    mask = arguments.get("attention_mask")
    if (mask is not None) != has_mask:
        return "a mask that comes or goes between steps"
    if mask is not None and mask.shape != (rows, store.columns + 1):
        return "a mask that is not the prompt's with ones behind it"
    positions = arguments.get("position_ids")
    if positions is not None and positions.shape not in ((rows, 1), (1, 1)):
        return "position_ids that are not (batch, 1)"
    for name, value in arguments.items():
        if name not in _KNOWN and value is not None and value is not False:
            return f"the argument {name}"
    return None
