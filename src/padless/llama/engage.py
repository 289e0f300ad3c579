"""`replace_llama_attn_with_flash_attn()`: puts the forwards in place and proves that they serve."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

from padless.environment import has_sdpa
from padless.errors import EngagementError
from padless.hf.call import modeling_llama
from padless.hf.changes import Change
from padless.hf.eras import Era, installed_era
from padless.llama.handle import Handle, Path
from padless.llama.ledger import ledger
from padless.llama.paths import _prepare_decoder_attention_mask, forward, forward_2
from padless.llama.proof import prove_engaged, tiny_outputs
from padless.llama.stock import forget_stock_forwards, remember_stock_forward, stock_forward

_logger = logging.getLogger("padless")
_active: Handle | None = None


def replace_llama_attn_with_flash_attn() -> Handle:
    """Replaces the attention forward of every LLaMA in this process, built before or after.

    Takes `forward_2` where torch has `scaled_dot_product_attention` (2.0 and later), otherwise
    `forward` and then also the mask preparation of `LlamaModel` where there is one.

    Returns:
        A handle with `undo()`, `report()` and use as a context manager. A second call changes
        nothing, says so, and returns the first call's handle.

    Raises:
        EngagementError: the replacement does not take effect, or not the same effect, on a small
            model of the installed transformers; everything is as it was then.
        UnsupportedError: transformers is missing or older than 4.28.
    """
    return engage("sdpa" if has_sdpa() else "flash")


def engage(path: Path) -> Handle:
    """Engages one of the two paths for the whole process.

    Args:
        path: "sdpa" puts `forward_2` in place, "flash" `forward` and the mask preparation.

    Returns:
        The handle; the one in force if this path is engaged already.

    Raises:
        EngagementError: as `replace_llama_attn_with_flash_attn`, or the other path is engaged, or
            `patch_llama` is.
        UnsupportedError: transformers is missing or older than 4.28.
    """
    global _active
    if _active is not None:
        if _active.path == path:
            _logger.warning("LLaMA attention is replaced already (%s path); nothing changed", path)
            return _active
        raise EngagementError(
            f"the {_active.path} path is engaged already, cannot engage the {path} path; "
            f"undo() the first handle"
        )
    era = installed_era()
    llama = modeling_llama()
    if any(name.startswith("_padless") for name in vars(llama.LlamaModel)):
        raise EngagementError(
            "patch_llama() is in force already, and its layers attend by themselves; "
            "undo() its handle, or call it after this"
        )
    before = tiny_outputs()
    changes = _plan(path, era, llama)
    applied: list[Change] = []
    try:
        for change in changes:
            _put_in_place(change)
            applied.append(change)
        prove_engaged(before)
    except BaseException:
        for change in reversed(applied):
            change.revert()
        _forget()
        raise
    ledger.clear()
    from transformers import __version__

    _active = Handle(path, __version__, era.name, tuple(changes), on_undo=_forget)
    _logger.info("LLaMA attention replaced: %s", ", ".join(c.where for c in changes))
    return _active


@contextmanager
def suspended() -> Iterator[None]:
    """Takes the patch out of force for a while, and puts the same handle back afterwards."""
    global _active
    handle = _active
    if handle is None:
        yield
        return
    for change in reversed(handle.changes):
        change.revert()
    _forget()
    kept = ledger.exchange(weakref.WeakKeyDictionary())
    try:
        yield
    finally:
        ledger.exchange(kept)
        for change in _plan(handle.path, installed_era(), modeling_llama()):
            _put_in_place(change)
        _active = handle


def _put_in_place(change: Change) -> None:
    change.apply()
    if change.attribute == "forward":
        remember_stock_forward(change.owner, change.old)


def _forget() -> None:
    """Ends the engagement once the classes have their stock forwards back."""
    global _active
    _active = None
    # Layers that were hooked meanwhile hold on to ours.
    for layer in _living(modeling_llama().LlamaAttention):
        bound = vars(layer).get("_old_forward")
        stock = stock_forward(type(layer))
        if stock is not None and getattr(bound, "__func__", None) in (forward, forward_2):
            layer._old_forward = MethodType(stock, layer)
    forget_stock_forwards()


def _plan(path: Path, era: Era, llama: ModuleType) -> list[Change]:
    """Lists every attribute to replace; changes nothing."""
    new = forward_2 if path == "sdpa" else forward
    changes = []
    for name in era.classes:
        cls = getattr(llama, name, None)
        if cls is None or "forward" not in vars(cls):
            raise EngagementError(
                f"transformers of era {era.name} should have {llama.__name__}.{name}.forward, "
                f"and this one has not"
            )
        changes.append(
            Change(cls, "forward", vars(cls)["forward"], new, f"{llama.__name__}.{name}.forward")
        )
    if path == "flash" and era.has_mask_hook:
        hook = "_prepare_decoder_attention_mask"
        where = f"{llama.__name__}.LlamaModel.{hook}"
        old = vars(llama.LlamaModel)[hook]
        changes.append(Change(llama.LlamaModel, hook, old, _prepare_decoder_attention_mask, where))
    return changes + _plan_bound_early(llama.LlamaAttention, [c.old for c in changes], new)


def _plan_bound_early(
    attention: type, stock: list[Callable[..., Any]], new: Callable[..., Any]
) -> list[Change]:
    """Finds living layers that hold on to the stock forward and would not see the class change.

    Accelerate's hooks (device_map, CPU offload) keep the method that they found as `_old_forward`.
    """
    changes, others = [], 0
    for layer in _living(attention):
        bound = vars(layer).get("_old_forward")
        if isinstance(bound, MethodType) and bound.__func__ in stock:
            where = f"{type(layer).__name__}[{getattr(layer, 'layer_idx', '?')}]._old_forward"
            changes.append(Change(layer, "_old_forward", bound, MethodType(new, layer), where))
        elif bound is None and "forward" in vars(layer):
            others += 1
    if others:
        _logger.warning("%d LLaMA attention layers have a forward of their own: kept", others)
    return changes


def _living(attention: type) -> list[Any]:
    """Finds every instance of a class and its subclasses; an instance refers to its class."""
    classes = [attention]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    return [thing for thing in gc.get_referrers(*classes) if isinstance(thing, attention)]
