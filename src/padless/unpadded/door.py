"""The forwards of a model and of its language modelling head: unpad in front, pad back behind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch._dynamo
from torch import Tensor, nn

from padless.hf.eras import Era
from padless.unpadded.batch import ARGUMENT, FlatBatch, Passed
from padless.unpadded.call import PACKING, PER_TOKEN, flatten_call, leave_to_stock
from padless.unpadded.kept import KeptKeys
from padless.unpadded.ledger import Ledger
from padless.unpadded.outputs import is_read_on_return, pad_on_return, pad_outputs
from padless.unpadded.prompts import RIGHT_PADDING
from padless.unpadded.seams import batch_arguments
from padless.unpadded.session import current_session
from padless.unpadded.sharding import gather_loss, gathered

Forward = Callable[..., Any]


def model_forward(
    inner_of: Callable[[nn.Module], Forward],
    ledger_of: Callable[[nn.Module], Ledger | None],
    stock: Forward,
    era: Era,
) -> Forward:
    """Makes the forward that takes the place of `LlamaModel`'s.

    Args:
        inner_of: finds the bound forward that stood there.
        ledger_of: finds where to count; None if the patch was undone.
        stock: the function whose signature it shows.
        era: of the installed transformers.
    """
    inner_of = torch._dynamo.disable(inner_of)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = ledger_of(self)
        if ledger is None:
            # Undone, and still called by what had wrapped it.
            return inner_of(self)(*args, **kwargs)
        arguments = _named(stock, args, kwargs)
        mask = arguments.get("attention_mask")
        whole = None
        if ARGUMENT in arguments:
            # From a patch of this model around the one of the whole process.
            return inner_of(self)(**arguments)
        if isinstance(mask, FlatBatch):
            return inner_of(self)(**{**arguments, **batch_arguments(mask, era)})
        if isinstance(mask, Passed):
            arguments.update(mask.packing, attention_mask=mask.attention_mask)
            whole = mask.is_whole
            if mask.is_stock:
                return inner_of(self)(**arguments)
        found = _flatten_call(self, arguments, ledger, era, whole)
        if found is None:
            return inner_of(self)(**_without_ours(arguments))
        as_tuple = _wants_tuple(self.config, arguments)
        found.kept = _put_off(arguments, era)
        arguments.update(batch_arguments(found, era), return_dict=True)
        outputs = _finish(inner_of(self)(**arguments), found)
        ledger.count(found)
        return outputs.to_tuple() if as_tuple else outputs

    return _run_eagerly(forward)


def causal_lm_forward(
    inner_of: Callable[[nn.Module], Forward],
    ledger_of: Callable[[nn.Module], Ledger | None],
    stock: Forward,
    era: Era,
    *,
    is_outer: bool = False,
) -> Forward:
    """Makes the forward that takes the place of `LlamaForCausalLM`'s: head and loss unpadded too.

    Args and the arguments' meaning are those of `model_forward`; and is_outer, whether what it
    calls is a wrapper around another such forward, to which it leaves what it does not flatten.
    """
    inner_of = torch._dynamo.disable(inner_of)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = ledger_of(self)
        if ledger is None:
            return inner_of(self)(*args, **kwargs)
        arguments = _named(stock, args, kwargs)
        session = _current_session(self)
        if is_outer and (session is not None or _keeps_some_logits(arguments)):
            return inner_of(self)(**arguments)
        # Ranks need not generate alike: one that ends sooner would leave the others waiting.
        whole = None if session is None else "generate"
        if session is not None:
            served = session.serve(arguments, ledger)
            if served is not None:
                return served
            if session.takes_stock_prompt():
                leave_to_stock(RIGHT_PADDING, arguments, ledger)
                return inner_of(self)(**_pass_on(arguments, is_stock=True))
        if isinstance(arguments.get("attention_mask"), (FlatBatch, Passed)):
            # From a patch of this model around the one of the whole process.
            return inner_of(self)(**arguments)
        if _keeps_some_logits(arguments):
            # Picked by padded position: the model alone is unpadded, and the head sees few tokens.
            # A loss of some logits may still be compared with padding.
            with_loss = any(arguments.get(name) is not None for name in PER_TOKEN)
            if with_loss:
                leave_to_stock("a loss of some logits", arguments, ledger)
            return inner_of(self)(**_pass_on(arguments, is_stock=with_loss, is_whole=whole))
        found = _flatten_call(self.model, arguments, ledger, era, whole)
        if found is None:
            return inner_of(self)(**_pass_on(_without_ours(arguments), is_stock=True))
        as_tuple = _wants_tuple(self.config, arguments)
        found.kept = _put_off(arguments, era)
        arguments.update(attention_mask=found, return_dict=True)
        outputs = _finish(inner_of(self)(**arguments), found, None if as_tuple else self)
        ledger.count(found)
        return outputs.to_tuple() if as_tuple else outputs

    return _run_eagerly(forward)


def _put_off(arguments: dict[str, Any], era: Era) -> KeptKeys | None:
    """Whether the cache may be filled once the caller reads it: no one else has hold of it."""
    # Older layers return their part of it.
    if era.returned != 2 or arguments.get("past_key_values") is not None:
        return None
    return KeptKeys()


def _put_together(outputs: Any, batch: FlatBatch, module: nn.Module | None = None) -> Any:
    gather = None
    if batch.shard is not None:
        gather_loss(outputs, batch.shard)
        gather = gathered(batch.shard, batch.layout)
    if module is not None and is_read_on_return(module):
        pad_on_return(module, batch.layout, gather, batch.kept)
        return outputs
    return pad_outputs(outputs, batch.layout, gather, batch.kept)


# What torch.compile has to leave alone: it waits for the device, and each batch is another.
_flatten_call = torch._dynamo.disable(flatten_call)
_finish = torch._dynamo.disable(_put_together)
_current_session = torch._dynamo.disable(current_session)


def _run_eagerly(forward: Forward) -> Forward:
    """Keeps torch.compile out of a door's own frame; what it calls inside is compiled."""
    door = torch._dynamo.disable(forward, recursive=False)
    return functools.update_wrapper(door, forward)


@functools.lru_cache(maxsize=64)
def _positional(stock: Forward) -> tuple[str, ...]:
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _named(stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(_positional(stock)):
        # Too many: raises what a call would, unless there is a *args.
        inspect.signature(stock).bind(None, *args, **kwargs)
        raise TypeError(
            f"arguments must be given by name to {stock.__qualname__}, whose signature has no "
            f"names for them, got {len(args)} by position"
        )
    if not args:
        # The door's own already.
        return kwargs
    return {**dict(zip(_positional(stock), args, strict=False)), **kwargs}


def _keeps_some_logits(arguments: dict[str, Any]) -> bool:
    for name in ("logits_to_keep", "num_logits_to_keep"):
        kept = arguments.get(name)
        if isinstance(kept, Tensor) or kept:
            return True
    return False


def _pass_on(
    arguments: dict[str, Any], *, is_stock: bool, is_whole: str | None = None
) -> dict[str, Any]:
    """Hands a padded batch to the inner door, which the outer one's arguments do not all reach."""
    packing = {name: arguments.pop(name) for name in PACKING if name in arguments}
    passed = Passed(arguments.get("attention_mask"), packing, is_stock, is_whole)
    return {**arguments, "attention_mask": passed}


def _without_ours(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drops what only padless knows, before the stock path."""
    return {name: value for name, value in arguments.items() if name != "layout"}


def _wants_tuple(config: Any, arguments: dict[str, Any]) -> bool:
    asked = arguments.get("return_dict")
    if asked is None:
        asked = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)
    return not asked
