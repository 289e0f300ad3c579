"""`patch()` and `patch_llama()`: put the unpadding forwards in place, all of them or none."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from padless.errors import EngagementError, UnsupportedError
from padless.hf.call import modeling_llama
from padless.hf.changes import ABSENT, Change
from padless.hf.eras import Era, installed_era
from padless.selection import BACKENDS
from padless.unpadded.door import causal_lm_forward, model_forward
from padless.unpadded.generate import generate_with_session
from padless.unpadded.handle import PatchHandle
from padless.unpadded.instance import (
    LEDGER,
    OUTER,
    Door,
    Hook,
    StepInFront,
    function_of,
    home_of,
    inner_of_instance,
    ledger_of_instance,
    refuse_other_attention,
    refuse_other_model,
    slot_of,
    wrapper_of_instance,
)
from padless.unpadded.layer import layer_forward
from padless.unpadded.ledger import Ledger
from padless.unpadded.process import Rebound, plan_process, plan_rebound
from padless.unpadded.proof import generation_fault, prove
from padless.unpadded.seams import mask_changes, through
from padless.unpadded.sharding import SequenceParallel

_logger = logging.getLogger("padless")
_process_handle: PatchHandle | None = None

# Where forwards of a language modelling head are from that keep their meaning on a flat batch.
_KNOWN = ("transformers.", "liger_kernel.")

AnyChange = Change | Hook | Rebound
Forward = Callable[..., Any]
Maker = Callable[..., Forward]


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    sequence_mesh: Any = None,
    sequence_parallel: str = "auto",
) -> PatchHandle:
    """Makes one model compute its real tokens only, with the best attention kernel there is.

    The batch is unpadded once before the embedding; head and loss run on real tokens too; what the
    caller asked for is padded back once at the end. Packed rows (`position_ids` that restart,
    `cu_seq_lens_q`, or `layout=`, a `VarlenLayout`) are kept apart. Calls that cannot be served so
    take transformers' own path, and say so once.

    Args:
        model: a LLaMA, or what wraps one (PEFT, DDP, a classifier, ...).
        backend: of `varlen_attention`, which is used or raises; "auto" takes the best.
        sequence_mesh: a DeviceMesh of one dimension, whose ranks share each sequence: all are given
            the same batch, each computes a part of its tokens, and all get the same loss. Gradients
            are to be averaged over its ranks, as DDP and FSDP do.
        sequence_parallel: "ulysses" or "ring"; "auto" takes for each batch the one whose ranks send
            less to each other.

    Returns:
        A handle with `undo()`, `report()` and use as a context manager.

    Raises:
        TypeError: model is not a torch module, or sequence_mesh not a DeviceMesh.
        ValueError: no backend or algorithm has this name, or the mesh more than one dimension.
        RuntimeError: torch.distributed is not initialised.
        UnsupportedError: there is no LLaMA in the model, or one whose model or attention has
            a forward of somebody else's; or transformers is too old.
        EngagementError: the model is patched already; or the patched forwards do not compute on a
            small model what transformers computes. Nothing is changed then.
    """
    _check_backend(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    era = installed_era()
    sequence = SequenceParallel.of(sequence_mesh, sequence_parallel)
    if sequence is not None:
        sequence.refuse(model)
    ledger = Ledger(backend, sequence=sequence)
    changes = _plan_instance(model, ledger, era)

    def engage(tiny: Any) -> Callable[[], None]:
        return _apply(_plan_instance(tiny, Ledger("auto"), era))

    prove(engage, era)
    ledger.generation_fault = generation_fault(engage, era)
    return _handle(changes, era)


def patch_llama(
    *, backend: str = "auto", sequence_mesh: Any = None, sequence_parallel: str = "auto"
) -> PatchHandle:
    """Does what `patch` does for every LLaMA of this process, built before or after.

    Args:
        backend: of `varlen_attention`, which is used or raises; "auto" takes the best.
        sequence_mesh: as `patch` has it, for every LLaMA. One that cannot be shared out is refused
            when it is called.
        sequence_parallel: as `patch` has it.

    Returns:
        A handle as `patch` returns it. A second call changes nothing, says so, and returns the
        first one's.

    Raises:
        TypeError, ValueError, RuntimeError: as `patch`.
        UnsupportedError: transformers is missing or too old.
        EngagementError: as `patch`; or a second call has a sequence_mesh.
    """
    global _process_handle
    _check_backend(backend)
    if _process_handle is not None:
        if sequence_mesh is not None:
            raise EngagementError(
                "sequence_mesh must come with the first patch_llama(), and every LLaMA of this "
                "process is patched already; undo() its handle"
            )
        _logger.warning("every LLaMA is patched already; nothing changed")
        return _process_handle
    era = installed_era()
    ledger = Ledger(backend, sequence=SequenceParallel.of(sequence_mesh, sequence_parallel))
    changes = plan_process(ledger, era)

    def engage(tiny: Any) -> Callable[[], None]:
        return _apply(plan_process(Ledger("auto"), era))

    prove(engage, era)
    ledger.generation_fault = generation_fault(engage, era)
    _process_handle = _handle([*changes, *plan_rebound(changes)], era, on_undo=_forget_process)
    return _process_handle


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Takes a model's patch, and the process's, out of force for a while; the handles stay good."""
    ledgers = {id(found): found for m in model.modules() if (found := vars(m).get(LEDGER))}
    handles = [ledger.handle for ledger in ledgers.values() if ledger.handle is not None]
    if _process_handle is not None:
        handles.append(_process_handle)
    for handle in handles:
        for change in reversed(handle.changes):
            change.revert()
    try:
        yield
    finally:
        for handle in reversed(handles):
            for change in handle.changes:
                change.apply()


def _forget_process() -> None:
    global _process_handle
    _process_handle = None


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def _handle(
    changes: Sequence[AnyChange], era: Era, on_undo: Callable[[], None] = lambda: None
) -> PatchHandle:
    from transformers import __version__

    _apply(changes)
    ledger = next(c.new for c in changes if c.attribute == LEDGER)
    _logger.info("unpadding engaged: %d attributes replaced", len(changes))
    ledger.handle = PatchHandle(__version__, era.name, tuple(changes), ledger, on_undo)
    return ledger.handle


def _apply(changes: Sequence[AnyChange]) -> Callable[[], None]:
    """Makes the changes, all or none; returns what takes them back."""
    applied: list[AnyChange] = []

    def revert() -> None:
        for change in reversed(applied):
            change.revert()

    try:
        for change in changes:
            change.apply()
            applied.append(change)
    except BaseException:
        revert()
        raise
    return revert


def _plan_instance(model: nn.Module, ledger: Ledger, era: Era) -> list[AnyChange]:
    """Lists every attribute of a model's modules to replace; changes nothing."""
    llama = modeling_llama()
    if LEDGER in vars(llama.LlamaModel):
        raise EngagementError(
            "model must not be patched already, and every LLaMA of this process is; "
            "undo() the handle of patch_llama()"
        )
    inner_of = functools.partial(inner_of_instance, ledger.number)
    ledger_of = functools.partial(ledger_of_instance, ledger.number)
    changes: list[AnyChange] = []
    for name, module in model.named_modules():
        where = f"{name or 'model'}"
        if vars(module).get(LEDGER) is not None:
            raise EngagementError(
                f"model must not be patched already, and its {where} is; undo() the first handle"
            )
        if isinstance(module, llama.LlamaAttention):
            refuse_other_attention(module, where)
            make: Maker = functools.partial(layer_forward, inner_of)
        elif isinstance(module, llama.LlamaModel):
            refuse_other_model(module, llama, era)
            inner = functools.partial(_inner_model, era, ledger.number)
            make = functools.partial(model_forward, inner, ledger_of)
            changes.extend(mask_changes(module, where, era))
        elif isinstance(module, llama.LlamaForCausalLM) and home_of(module).startswith(_KNOWN):
            make = functools.partial(causal_lm_forward, inner_of, ledger_of)
            changes.append(Hook(module, StepInFront(), f"{where} before Liger"))
            changes.append(_outer_door(module, ledger_of, where, era))
            changes.extend(_generate_changes(module, ledger_of, where, era))
        else:
            continue
        changes.extend(_instance_changes(module, make, ledger, where, era))
    if not any(isinstance(c.owner, llama.LlamaModel) for c in changes):
        raise UnsupportedError(
            f"model must hold a LLaMA (transformers' LlamaModel), got {type(model).__name__} "
            f"without one"
        )
    return changes


def _instance_changes(
    module: nn.Module, make: Maker, ledger: Ledger, where: str, era: Era
) -> list[AnyChange]:
    slot = slot_of(module)
    found = vars(module).get(slot, ABSENT)
    forward = make(function_of(found) or type(module).forward, era)
    return [
        Change(module, LEDGER, ABSENT, ledger, f"{where}.{LEDGER}"),
        Door(module, slot, found, MethodType(forward, module), f"{where}.{slot}"),
    ]


def _outer_door(
    module: nn.Module, ledger_of: Callable[[nn.Module], Ledger | None], where: str, era: Era
) -> Change:
    forward = causal_lm_forward(
        wrapper_of_instance, ledger_of, type(module).forward, era, is_outer=True
    )
    return Change(module, OUTER, ABSENT, MethodType(forward, module), f"{where}.{OUTER}")


def _generate_changes(
    module: Any, ledger_of: Callable[[nn.Module], Ledger | None], where: str, era: Era
) -> list[Change]:
    stock = getattr(type(module), "generate", None)
    if stock is None or "generate" in vars(module):
        # Models without it there are from 4.50 on; one of somebody else's stays as it is.
        return []

    def inner_of(self: Any) -> Forward:
        return MethodType(type(self).generate, self)

    generate = generate_with_session(inner_of, ledger_of, stock, era)
    new = MethodType(generate, module)
    return [Change(module, "generate", ABSENT, new, f"{where}.generate")]


def _inner_model(era: Era, number: int, module: nn.Module) -> Forward:
    inner = inner_of_instance(number, module)
    if era.mask_made_by == "functions" and isinstance(inner, MethodType):
        return MethodType(through(era, inner.__func__), module)
    return inner
