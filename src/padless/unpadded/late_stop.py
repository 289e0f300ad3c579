"""Whether a `generate` call is over: asked of the device after each token, read a token later.

transformers waits for the answer, and then the device waits for the next step, which is launched
behind it. Here the next step is launched first. Where all rows turn out to have ended, it was one
too many: its column, behind the end of every row, is taken off the result.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from padless.hf.changes import Change
from padless.unpadded.instance import StepInFront
from padless.unpadded.session import Session

_current: ContextVar[LateStop | None] = ContextVar("padless_late_stop", default=None)
_counting = threading.Lock()
_users = 0
_changes: list[Change] = []


class LateStop:
    """The answers of one `generate` call.

    Args:
        session: of the call.
        samples: whether the call draws from the device's generator.

    Attributes:
        is_past: whether a step was computed behind the end of all rows.
    """

    def __init__(self, session: Session, *, samples: bool) -> None:
        self.session = session
        self.is_past = False
        self._samples = samples
        self._unread: _Answer | None = None
        self._spare: _Answer | None = None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes transformers ask here, in this thread, for this call's model alone."""
        token = _current.set(self)
        _hold()
        try:
            yield
        finally:
            _let_go()
            _current.reset(token)

    def goes_on(self, is_over: Tensor) -> bool:
        """Says whether there is to be another step.

        Args:
            is_over: bool `()`, whether all rows have ended, on the device.
        """
        before, self._unread = self._unread, None
        asked = self._ask(is_over) if self.session.may_run_ahead else None
        if before is not None:
            if before.read():
                self.is_past = True
                before.undo_draws()
                return False
            self._spare = before
        self._unread = asked
        return asked is not None or not bool(is_over)

    def trim(self, ids: Tensor) -> Tensor:
        """Takes the column of a step that was one too many off `(batch, columns)`."""
        return ids[:, :-1].contiguous() if self.is_past else ids

    def _ask(self, is_over: Tensor) -> _Answer:
        answer, self._spare = self._spare or _Answer(is_over.device, samples=self._samples), None
        answer.ask(is_over)
        return answer


class _Answer:
    """A flag on its way to the host, and what the device's generator was like in front of it.

    Args:
        device: of the flag.
        samples: whether the generator is used.
    """

    def __init__(self, device: torch.device, *, samples: bool) -> None:
        on_cuda = device.type == "cuda"
        self._flag = torch.empty((), dtype=torch.bool, pin_memory=on_cuda)
        self._arrived = torch.cuda.Event() if on_cuda else None
        self._generator = _generator_of(device) if samples else None
        self._state: Tensor | None = None

    def ask(self, flag: Tensor) -> None:
        """Begins to copy a flag; nothing waits for it."""
        self._flag.copy_(flag, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(flag.device))
        if self._generator is not None:
            self._state = self._generator.get_state()

    def read(self) -> bool:
        """Waits for the flag."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)

    def undo_draws(self) -> None:
        """Makes the next call draw what it would have drawn without the steps since."""
        if self._generator is not None and self._state is not None:
            self._generator.set_state(self._state)


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def is_seen_by_nobody(model: Any, generate: Callable[..., Any]) -> bool:
    """Whether nobody but transformers sees a call's steps, and its tokens before it returns them.

    Args:
        model: the `LlamaForCausalLM`.
        generate: the bound method that is about to be called.
    """
    from transformers import GenerationMixin

    if getattr(generate, "__func__", None) is not GenerationMixin.generate:
        return False
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    if not all(isinstance(hook, StepInFront) for hook in hooks):
        return False
    return all(
        name not in vars(model) and getattr(type(model), name) is getattr(GenerationMixin, name)
        for name in ("_sample", "_has_unfinished_sequences")
    )


def _hold() -> None:
    """Replaces what reads the answer in transformers, for as long as some thread wants it."""
    global _users
    with _counting:
        _users += 1
        if _users == 1:
            _changes.extend(_plan())
            for change in _changes:
                change.apply()


def _let_go() -> None:
    global _users
    with _counting:
        _users -= 1
        if not _users:
            while _changes:
                _changes.pop().revert()


def _plan() -> list[Change]:
    from transformers.generation import utils

    name = "_has_unfinished_sequences"
    asks = getattr(utils.GenerationMixin, name)
    changes = [Change(utils.GenerationMixin, name, asks, _asking(asks), f"GenerationMixin.{name}")]
    # From 5.17 on the answer has been read before that.
    check = getattr(utils, "StopCheck", None)
    if check is not None:
        reads = check.__call__
        changes.append(Change(check, "__call__", reads, _not_reading(reads), "StopCheck.__call__"))
    return changes


def _asking(stock: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(stock)
    def goes_on(
        self: Any, this_peer_finished: Any, synced_gpus: bool, *args: Any, **kwargs: Any
    ) -> bool:
        late = _current.get()
        # No tensor in front of the first token.
        is_asked = isinstance(this_peer_finished, Tensor) and not synced_gpus
        if is_asked and late is not None and late.session.head is self:
            return late.goes_on(this_peer_finished)
        return stock(self, this_peer_finished, synced_gpus, *args, **kwargs)

    return goes_on


def _not_reading(stock: Callable[..., bool]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def is_over(self: Any, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> Any:
        if _current.get() is None or self.streamer is not None:
            return stock(self, unfinished_sequences, tokens, length)
        return unfinished_sequences.max() == 0

    return is_over
