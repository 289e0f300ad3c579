"""How a flat batch gets past `LlamaModel.forward` to the layers, on each transformers version.

Older versions build a mask of their own from whatever they are given; each has one place where a
flat batch, which needs none, can be handed on as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from padless.hf.changes import ABSENT, Change
from padless.hf.eras import Era
from padless.unpadded.batch import ARGUMENT, FlatBatch
from padless.unpadded.instance import function_of

Forward = Callable[..., Any]

# In transformers 4.35 to 4.37.
_FUNCTIONS = ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa")


def batch_arguments(batch: FlatBatch, era: Era) -> dict[str, Any]:
    """Returns the arguments of `LlamaModel.forward` by which the layers get the batch.

    Note:
        With `create_causal_mask` the mask is a 4D int32 tensor that no attention takes: a layer
        that were not ours would fail aloud.
    """
    if era.mask_made_by == "create_causal_mask":
        return {"attention_mask": batch.layout.cu_seqlens.view(1, 1, 1, -1), ARGUMENT: batch}
    return {"attention_mask": batch}


def mask_method(stock: Forward) -> Forward:
    """Makes a mask preparing method that hands a flat batch on and does all else as before.

    Args:
        stock: the method as a function of `(self, attention_mask, ...)`.
    """

    @functools.wraps(stock)
    def method(self: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attention_mask, FlatBatch):
            return attention_mask
        return stock(self, attention_mask, *args, **kwargs)

    return method


def with_functions_replaced(forward: Any) -> Any:
    """Makes a copy of a forward for which the mask functions of its module hand a batch on.

    The module itself stays as it is: other models of the process go on using it.

    Args:
        forward: a plain function.
    """
    names = dict(forward.__globals__)
    for name in _FUNCTIONS:
        if name in names:
            names[name] = _hand_on(names[name])
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward)


def _hand_on(stock: Forward) -> Forward:
    @functools.wraps(stock)
    def prepare(attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attention_mask, FlatBatch):
            return attention_mask
        return stock(attention_mask, *args, **kwargs)

    return prepare


def mask_changes(owner: Any, where: str, era: Era) -> list[Change]:
    """Lists the change by which a version's own method hands a flat batch on, if it has one.

    Args:
        owner: a `LlamaModel` or its class.
        where: its name, for people.
        era: of the installed transformers.
    """
    name = era.mask_made_by
    if name in ("functions", "create_causal_mask"):
        return []
    found = vars(owner).get(name, ABSENT)
    is_class = isinstance(owner, type)
    method = mask_method(function_of(found) or getattr(owner if is_class else type(owner), name))
    new = method if is_class else MethodType(method, owner)
    return [Change(owner, name, found, new, f"{where}.{name}")]


@functools.cache
def through(era: Era, forward: Any) -> Any:
    """Returns `LlamaModel`'s forward, or the copy of it that a version needs."""
    return with_functions_replaced(forward) if era.mask_made_by == "functions" else forward
