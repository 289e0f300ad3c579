"""What a patch leaves on the modules of one model: a forward in front of what stood there.

All of it lives on the instances, so that a copy of the model has its own, and nothing of it in
parameters, buffers or the config.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from padless.errors import UnsupportedError
from padless.hf.changes import ABSENT, Change
from padless.hf.eras import Era
from padless.unpadded.ledger import Ledger

Forward = Callable[..., Any]

_logger = logging.getLogger("padless")

# Attributes of patched instances; a copy of the model has its own.
INNER = "_padless_inner"
DOOR = "_padless_door"
LEDGER = "_padless_ledger"
# A second door, for in front of a wrapper that reads every output; and that wrapper, while it is.
OUTER = "_padless_outer"
WRAPPER = "_padless_wrapper"

# Where wrappers are from that do with a flat batch what they do with a padded one: accelerate's
# mixed precision is autocast around the forward, and outputs in float32 behind it.
_WRAPPERS = ("accelerate.utils.operations", "torch.amp.autocast_mode")
_MEANING_KEPT = ("transformers.", *_WRAPPERS)
# Where forwards of attention layers are from that compute what ours do.
_KNOWN_ATTENTION = ("transformers.", "padless.")


@dataclass(frozen=True)
class Door(Change):
    """A forward of ours in front of what stood there, which it finds on the instance."""

    def apply(self) -> None:
        """Puts the forward in place and keeps what stands there for it to call."""
        if vars(self.owner).get(DOOR) is self.new:
            # Set aside for a while, inside of a wrapper that has stayed.
            return
        slot = slot_of(self.owner)
        found = vars(self.owner).get(slot, ABSENT)
        if found is not ABSENT:
            setattr(self.owner, INNER, found)
        setattr(self.owner, DOOR, self.new)
        setattr(self.owner, slot, self.new)

    def revert(self) -> None:
        """Puts back what the forward calls by now; inside of somebody's wrapper it stays."""
        current = vars(self.owner).get(slot_of(self.owner))
        if current is not None and current is vars(self.owner).get(OUTER):
            current = vars(self.owner).pop(WRAPPER)
            self.owner.forward = current
        if current is not None and current is not self.new and not _is_liger(current):
            # What the wrapper calls finds that the patch is not in force.
            _logger.warning("%s was replaced again since; undo leaves it as it is", self.where)
            return
        inner = vars(self.owner).get(INNER, ABSENT)
        if inner is not ABSENT:
            delattr(self.owner, INNER)
        delattr(self.owner, DOOR)
        if vars(self.owner).get("_old_forward") is not self.new:
            Change(self.owner, self.attribute, inner, self.new, self.where).revert()
        elif inner is not ABSENT:
            self.owner._old_forward = inner
        else:
            # Accelerate's hook came later, and would have found the class's.
            self.owner._old_forward = MethodType(type(self.owner).forward, self.owner)


@dataclass
class Hook:
    """A forward pre-hook on a module."""

    owner: nn.Module
    function: Callable[..., None]
    where: str
    attribute: str = "_forward_pre_hooks"
    new: Any = None

    def apply(self) -> None:
        """Registers the hook."""
        self.new = self.owner.register_forward_pre_hook(self.function)

    def revert(self) -> None:
        """Removes it."""
        self.new.remove()


class StepInFront:
    """A pre-hook that goes back in front of what was put there since.

    That is a forward that Liger has bound to the instance, which the door calls from then on;
    accelerate's mixed precision around the door, which reads every output to make it float32, so
    that logits would be padded back each time: a second door goes in front of it; and the class's
    own forward, which accelerate finds under all wrappers, the door among them, when it takes its
    mixed precision off.

    Note:
        Torch looks the forward up before it runs the hooks: the call that finds it still runs it.
    """

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Puts the door in place again."""
        found = vars(module).get("forward")
        door = vars(module).get(DOOR)
        if found is None or door is None or found is door:
            return
        outer = vars(module).get(OUTER)
        if _is_liger(found):
            setattr(module, INNER, found)
            module.forward = door
        elif outer is not None and found is not outer and _keeps_meaning(found, door):
            setattr(module, WRAPPER, found)
            module.forward = outer
        elif _is_own(found, module):
            module.forward = door

    def __deepcopy__(self, memo: dict[int, Any]) -> StepInFront:
        return self

    def __reduce__(self) -> Any:
        # A pickled model is an unpatched one, and loads without padless: something that does
        # nothing takes the hook's place.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _is_liger(found: Any) -> bool:
    return str(getattr(found, "__module__", "")).startswith("liger_kernel.")


def _keeps_meaning(found: Any, door: Any) -> bool:
    """Whether a forward is a door in wrappers that do to a flat batch what they do to a padded one.

    Only if each of them tells what it wraps.
    """
    wrapped = function_of(found)
    while wrapped is not None and wrapped is not function_of(door):
        own: dict[str, str] = getattr(wrapped, "__globals__", {})
        # An object takes over the module's name of what it wraps; its class does not.
        if not (own.get("__name__") or type(wrapped).__module__).startswith(_WRAPPERS):
            return False
        wrapped = getattr(wrapped, "__wrapped__", None)
    return wrapped is not None


def _is_own(found: Any, module: nn.Module) -> bool:
    """Whether a forward is that of the module's class, with or without its decorators."""
    own: Any = type(module).forward
    while own is not None and own is not function_of(found):
        own = getattr(own, "__wrapped__", None)
    return own is not None


def wrapper_of_instance(module: nn.Module) -> Forward:
    """Finds the wrapper that the second door stands in front of."""
    found: Forward = vars(module)[WRAPPER]
    return found


def slot_of(module: nn.Module) -> str:
    """Names the attribute whose forward a patch replaces.

    Accelerate's hooks move the inputs and then call what they found; ours takes its place.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def function_of(found: Any) -> Any:
    """Returns the function of a bound method, or what is callable itself; None if absent."""
    return None if found is ABSENT else getattr(found, "__func__", found)


def home_of(module: nn.Module) -> str:
    """Names the Python module in which the forward of a module was written.

    Of a forward in wrappers, the outermost that may compute something of its own, if there is one.
    A wrapper may call itself by the names of what it wraps (functools.wraps), but its globals are
    those of the module that it was written in.
    """
    found = function_of(vars(module).get(slot_of(module), ABSENT)) or type(module).forward
    home: str = ""
    while found is not None:
        own: dict[str, str] = getattr(found, "__globals__", {})
        home = own.get("__name__") or getattr(found, "__module__", "") or ""
        if not home.startswith(_MEANING_KEPT):
            break
        found = getattr(found, "__wrapped__", None)
    return home


def inner_of_instance(number: int, module: nn.Module) -> Forward:
    """Finds the bound forward that stood where the door of a patch is now, or the class's.

    A wrapper may hold on to a door for longer than its patch, and what stands there now may be that
    wrapper: such a door leads to the class's forward.
    """
    is_in_force = ledger_of_instance(number, module) is not None
    found = vars(module).get(INNER) if is_in_force else None
    return found if found is not None else MethodType(type(module).forward, module)


def ledger_of_instance(number: int, module: nn.Module) -> Ledger | None:
    """Finds where a patch of a module counts; None if it is not in force any more."""
    found = vars(module).get(LEDGER)
    return found if found is not None and found.number == number else None


def refuse_other_model(module: nn.Module, llama: Any, era: Era) -> None:
    """Raises UnsupportedError if a model's forward is not LlamaModel's own."""
    own = function_of(vars(module).get(slot_of(module), ABSENT)) or type(module).forward
    if era.mask_made_by == "functions" and own is not type(module).forward:
        raise UnsupportedError(
            f"model must hold LlamaModel's own forward on transformers 4.35 to 4.37, got one from "
            f"{home_of(module) or 'nowhere'} around it; patch first, and wrap then"
        )
    if type(module).forward is not llama.LlamaModel.forward:
        raise UnsupportedError(
            f"model must be a LLaMA with LlamaModel's own forward, got {type(module).__name__}"
        )


def refuse_other_attention(module: nn.Module, where: str) -> None:
    """Raises UnsupportedError if a layer's forward may compute something else than ours."""
    if not home_of(module).startswith(_KNOWN_ATTENTION):
        raise UnsupportedError(
            f"model must attend by transformers' own forwards, and {where} "
            f"({type(module).__name__}) has one from {home_of(module) or 'nowhere'}, "
            f"which may compute something else"
        )
