"""Outputs of a flat batch in the padded shapes that the caller expects."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from padless.layout import VarlenLayout
from padless.unpadded.kept import KeptKeys

_PER_TOKEN = ("last_hidden_state", "hidden_states")
_PUT_OFF = ("logits", "past_key_values")
_lock = threading.RLock()


def pad_outputs(
    outputs: Any,
    layout: VarlenLayout,
    gather: Callable[[Tensor], Tensor] | None = None,
    kept: KeptKeys | None = None,
) -> Any:
    """Pads a model's outputs back, zeros at padding; logits and cache only once they are read.

    Args:
        outputs: a transformers ModelOutput of the flat batch, changed in place.
        layout: of the batch.
        gather: collects the tokens of a flat row that ranks share; None if nobody does.
        kept: what the cache among the outputs has yet to be given; None if it has all.

    Returns:
        The same object.

    Note:
        A step that reads only the loss never holds logits, keys or values of the padded shape.
    """
    for name in _PER_TOKEN:
        value = outputs.get(name)
        if isinstance(value, Tensor):
            outputs[name] = _pad(_whole(value, gather), layout)
        elif value is not None:
            outputs[name] = tuple(_pad(_whole(each, gather), layout) for each in value)
    pending: dict[str, Callable[[Any], Any]] = {}
    logits = outputs.get("logits")
    if logits is not None and layout.indices is None and gather is None:
        outputs["logits"] = _pad(logits, layout)
    elif logits is not None:
        pending["logits"] = lambda flat: _pad(_whole(flat, gather), layout)
    if kept and outputs.get("past_key_values") is not None:
        pending["past_key_values"] = kept.fill
    if pending:
        plain: Any = type(outputs)
        lazy = _lazy(plain)
        outputs.__dict__["_padless_pending"] = pending
        outputs.__class__ = lazy
    return outputs


# Modules in the middle of a call, with the hook that will pad what it returns.
_waiting: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def is_read_on_return(module: nn.Module) -> bool:
    """Whether FSDP2's hook reads all that a module returns, and no hook of somebody else's does."""
    if not any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        return False
    if module in _waiting:
        # Of a call that has failed in a hook.
        _waiting.pop(module).remove()
    hooks = list(module._forward_hooks.values())
    return [getattr(hook, "__name__", "") for hook in hooks] == ["_post_forward"]


def pad_on_return(
    module: nn.Module,
    layout: VarlenLayout,
    gather: Callable[[Tensor], Tensor] | None = None,
    kept: KeptKeys | None = None,
) -> None:
    """Does what `pad_outputs` does once FSDP2's hook has seen a module's flat outputs.

    It hangs on to their tensors, or returns others: what is padded, or collected from other ranks,
    is what it leaves. Else it would be the reader for whom logits are padded.

    Args:
        module: whose forward is running, called as a module.
        layout: of the batch.
        gather: as `pad_outputs` has it.
        kept: likewise.
    """

    def pad(module: nn.Module, args: Any, outputs: Any) -> Any:
        _waiting.pop(module).remove()
        return pad_outputs(outputs, layout, gather, kept)

    # Hooks are looked up behind the forward, and the last one is the last to run.
    _waiting[module] = module.register_forward_hook(pad)


def _pad(flat: Tensor, layout: VarlenLayout) -> Tensor:
    # Where a model is spread over devices, its end need not be where its batch was made flat.
    return layout.to(flat.device).pad(flat[0])  # (1, total, ...) to (batch, seqlen, ...)


def _whole(flat: Tensor, gather: Callable[[Tensor], Tensor] | None) -> Tensor:
    return flat if gather is None else gather(flat)


def _settle(outputs: Any, *names: str) -> None:
    """Makes what was put off, all of it if nothing is named; then it is an ordinary object again.

    Args:
        outputs: of a lazy class, or of one no more.
        names: of the outputs that are to be made.
    """
    with _lock:
        plain = vars(type(outputs)).get("_padless_plain")
        if plain is None:
            # Another thread did.
            return
        # Without any it is one that somebody has built from an instance's class and values.
        pending = outputs.__dict__.get("_padless_pending", {})
        for name in [name for name in pending if not names or name in names]:
            made = pending[name](outputs.__dict__[name])
            OrderedDict.__setitem__(outputs, name, made)
            outputs.__dict__[name] = made
            del pending[name]
        if not pending:
            # Last: from now on nobody asks here.
            object.__setattr__(outputs, "__class__", plain)
            outputs.__dict__.pop("_padless_pending", None)


def _settle_read(outputs: Any, key: Any) -> None:
    """Makes what is read under a key, or under a position: the loss stands in front if any."""
    if isinstance(key, str):
        if key in _PUT_OFF:
            _settle(outputs, key)
    elif not (key == 0 and outputs.__dict__.get("loss") is not None):
        _settle(outputs)


@functools.cache
def _lazy(plain: type) -> type:
    """Makes the class whose instances make what was put off at the first look at it."""

    def settled(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            _settle(self)
            return getattr(self, name)(*args, **kwargs)

        return method

    def __getitem__(self: Any, key: Any) -> Any:
        _settle_read(self, key)
        if "_padless_plain" not in vars(type(self)):
            return self[key]
        return OrderedDict.__getitem__(self, "loss" if key == 0 else key)

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __getattribute__(self: Any, name: str) -> Any:
        if name in _PUT_OFF:
            _settle(self, name)
        return object.__getattribute__(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        _settle(self)
        setattr(self, name, value)

    names = (
        "items", "values", "to_tuple", "copy", "pop", "popitem", "update", "setdefault", "clear",
        "__setitem__", "__delitem__", "__iter__", "__reversed__", "__eq__", "__repr__", "__or__",
        "__ior__", "__reduce__", "__reduce_ex__",
    )  # fmt: skip
    body = {name: settled(name) for name in names}
    body.update(
        __getitem__=__getitem__,
        get=get,
        __getattribute__=__getattribute__,
        __setattr__=__setattr__,
        __module__=plain.__module__,
        __doc__=plain.__doc__,
        __hash__=None,
        _padless_plain=plain,
    )
    return type(plain.__name__, (plain,), body)
