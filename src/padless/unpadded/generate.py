"""`generate` of a patched model: transformers' own, with a session around it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from padless.hf.eras import Era
from padless.unpadded.late_stop import LateStop, is_seen_by_nobody
from padless.unpadded.ledger import Ledger
from padless.unpadded.session import Session

Generate = Callable[..., Any]

# What makes another algorithm of it than one token a row and step: arguments of generate or fields
# of its config, by the reason.
_OTHER_ALGORITHMS = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_early_exit": "assisted decoding",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "custom_generate": "a custom generate",
    "prefill_chunk_size": "a prompt in chunks",
    "output_attentions": "output_attentions",
    "output_hidden_states": "output_hidden_states",
    "is_assistant": "a model that assists another",
}


def generate_with_session(
    inner_of: Callable[[nn.Module], Generate],
    ledger_of: Callable[[nn.Module], Ledger | None],
    stock: Generate,
    era: Era,
) -> Generate:
    """Makes the method that takes the place of a language model's `generate`.

    Args:
        inner_of: finds the bound method that stood there.
        ledger_of: finds where to count; None if the patch was undone.
        stock: the function whose signature it shows.
        era: of the installed transformers.
    """

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = inner_of(self)
        # Older layers return more, and their caches are tuples in part: as it was there.
        ledger = ledger_of(self)
        if ledger is None or era.returned != 2:
            return inner(*args, **kwargs)
        asked = _asked(stock, args, kwargs)
        refusal = ledger.generation_fault or _refusal(self, asked)
        session = Session(
            self,
            era,
            _most_tokens(self, asked),
            refusal,
            _copies(self, asked),
            _end_tokens(self, asked),
        )
        result = None
        late_stop = _late_stop(session, inner, asked)
        with session.in_force(), late_stop.in_force() if late_stop else nullcontext():
            try:
                result = inner(*args, **kwargs)
            finally:
                session.finish(result)
        return result if late_stop is None else late_stop.trim(result)

    return generate


@functools.lru_cache(maxsize=16)
def _positional(stock: Generate) -> tuple[str, ...]:
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _asked(stock: Generate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_positional(stock), args, strict=False)), **kwargs}


def _value(model: Any, asked: dict[str, Any], name: str) -> Any:
    """Reads an option from the call, from the config it was given, or from the model's."""
    if asked.get(name) is not None:
        return asked[name]
    for config in (asked.get("generation_config"), getattr(model, "generation_config", None)):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _refusal(model: Any, asked: dict[str, Any]) -> str | None:
    """Says why a call is left to transformers as a whole, as far as its options tell."""
    for name, reason in _OTHER_ALGORITHMS.items():
        if _value(model, asked, name):
            return reason
    if asked.get("past_key_values") is not None:
        return "a cache of the caller's"
    return None


def _most_tokens(model: Any, asked: dict[str, Any]) -> int | None:
    """Reads how many tokens a row may come to have; a hint for the size of buffers."""
    new, longest = (_value(model, asked, name) for name in ("max_new_tokens", "max_length"))
    prompts = [asked.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    columns = [x.shape[1] for x in prompts if isinstance(x, Tensor) and x.dim() > 1]
    if isinstance(new, int) and columns:
        return int(columns[0]) + new
    return longest if isinstance(longest, int) else None


def _copies(model: Any, asked: dict[str, Any]) -> int:
    """Reads how many rows are made of each prompt."""
    found = (_value(model, asked, name) for name in ("num_beams", "num_return_sequences"))
    # What is no number is for transformers to refuse.
    return max(1, *(n if isinstance(n, int) else 1 for n in found))


# What is computed of a row behind its end is somebody's then: in beams, in what is returned, or in
# what a processor of the caller's keeps.
_READS_ENDED_ROWS = (
    "return_dict_in_generate", "output_scores", "output_logits", "constraints", "logits_processor",
)  # fmt: skip


def _end_tokens(model: Any, asked: dict[str, Any]) -> tuple[int, ...]:
    """Reads after which tokens a row has ended and its further ones are padding; none if unsure."""
    if any(_value(model, asked, name) for name in _READS_ENDED_ROWS):
        return ()
    beams = _value(model, asked, "num_beams")
    if isinstance(beams, int) and beams > 1:
        return ()
    # As generate finds them, where there is one place to look alone: whether it goes on to the
    # model's own, if a config of the call's has none, depends on the version.
    if "eos_token_id" in asked:
        found = asked["eos_token_id"]
    else:
        config = asked.get("generation_config") or getattr(model, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
    if isinstance(found, Tensor):
        found = found.tolist()
    found = found if isinstance(found, (list, tuple)) else [found]
    return tuple(found) if all(type(each) is int for each in found) else ()


# Who is handed something of every step, and would see one too many.
_SEES_STEPS = (
    "return_dict_in_generate", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
    "streamer", "synced_gpus",
)  # fmt: skip


def _late_stop(session: Session, inner: Generate, asked: dict[str, Any]) -> LateStop | None:
    """Makes what reads a step late whether the call is over; None where somebody could tell."""
    head = session.head
    if any(_value(head, asked, name) for name in _SEES_STEPS) or not is_seen_by_nobody(head, inner):
        return None
    return LateStop(session, samples=bool(_value(head, asked, "do_sample")))
