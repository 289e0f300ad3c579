"""What a patch of the process leaves on transformers' classes: forwards in front of their own."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from padless.hf.call import modeling_llama
from padless.hf.changes import ABSENT, Change
from padless.hf.eras import Era
from padless.unpadded.door import causal_lm_forward, model_forward
from padless.unpadded.generate import generate_with_session
from padless.unpadded.instance import LEDGER, function_of
from padless.unpadded.layer import layer_forward
from padless.unpadded.ledger import Ledger
from padless.unpadded.seams import mask_changes, through

Forward = Callable[..., Any]
Maker = Callable[..., Forward]


def plan_process(ledger: Ledger, era: Era) -> list[Change]:
    """Lists every attribute of transformers' classes to replace; changes nothing.

    Args:
        ledger: where all LLaMAs of the process count.
        era: of the installed transformers.
    """
    llama = modeling_llama()
    changes = [Change(llama.LlamaModel, LEDGER, ABSENT, ledger, f"LlamaModel.{LEDGER}")]

    def ledger_of(module: nn.Module) -> Ledger | None:
        # What wrapped a forward of ours meanwhile holds on to it after the undo.
        return ledger if vars(llama.LlamaModel).get(LEDGER) is ledger else None

    def add(cls: type, make: Maker, seam: Callable[[Any], Any] = lambda stock: stock) -> None:
        stock = vars(cls)["forward"]
        inner = seam(stock)
        forward = make(lambda module: MethodType(inner, module), stock=stock, era=era)
        changes.append(Change(cls, "forward", stock, forward, f"{cls.__name__}.forward"))

    for name in era.classes:
        add(getattr(llama, name), layer_forward)

    def with_ledger(make: Maker) -> Maker:
        return lambda inner_of, **known: make(inner_of, ledger_of, **known)

    add(llama.LlamaModel, with_ledger(model_forward), functools.partial(through, era))
    add(llama.LlamaForCausalLM, with_ledger(causal_lm_forward))
    changes.extend(_generate_changes(llama.LlamaForCausalLM, ledger_of, era))
    return changes + mask_changes(llama.LlamaModel, "LlamaModel", era)


def _generate_changes(
    cls: Any, ledger_of: Callable[[nn.Module], Ledger | None], era: Era
) -> list[Change]:
    stock = getattr(cls, "generate", None)
    if stock is None:
        return []
    new = generate_with_session(
        lambda module: MethodType(stock, module), ledger_of, stock=stock, era=era
    )
    old = vars(cls).get("generate", ABSENT)
    return [Change(cls, "generate", old, new, f"{cls.__name__}.generate")]


class Rebound:
    """A module's forward that accelerate's hook had found before the class's was replaced.

    Args:
        module: held weakly: a patch of the process must not keep models alive.
        change: of the module's class.
    """

    attribute = "_old_forward"

    def __init__(self, module: nn.Module, change: Change) -> None:
        self._module = weakref.ref(module)
        self._change = change
        self.where = f"{type(module).__name__} under a hook"

    @property
    def owner(self) -> Any:
        """The module, or None if it is gone."""
        return self._module()

    @property
    def new(self) -> Any:
        """The function that stands there now."""
        return self._change.new

    def apply(self) -> None:
        """Puts the class's new forward in place."""
        self._exchange(self._change.old, self._change.new)

    def revert(self) -> None:
        """Puts the class's old forward back."""
        self._exchange(self._change.new, self._change.old)

    def _exchange(self, found: Forward, other: Forward) -> None:
        module = self.owner
        if module is not None and function_of(vars(module).get(self.attribute)) is found:
            module._old_forward = MethodType(other, module)


def plan_rebound(changes: list[Change]) -> list[Rebound]:
    """Finds living modules that hold on to a forward which a change of their class replaces."""
    by_stock = {change.old: change for change in changes if change.attribute == "forward"}
    classes = [change.owner for change in by_stock.values()]
    for cls in classes:
        classes.extend(sub for sub in cls.__subclasses__() if sub not in classes)
    # An instance refers to its class.
    living: list[Any] = [it for it in gc.get_referrers(*classes) if isinstance(it, tuple(classes))]
    return [
        Rebound(module, by_stock[function])
        for module in living
        if (function := function_of(vars(module).get("_old_forward"))) in by_stock
    ]
