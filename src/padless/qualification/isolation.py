"""A place apart from the caller's modes, for work in the middle of the caller's own.

A backend may have to be measured inside inference mode, autocast, a checkpointed region, a
compiled operator, a transform or a trace. None of that may change what is measured, and nothing of
what is measured may show up there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch._functorch import pyfunctorch

_T = TypeVar("_T")


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Enters the modes that a fresh thread has, on a device.

    Note:
        No fresh thread: inside a backward pass the thread that would have to compute its gradients
        is the one that waits for it.
    """
    with ExitStack() as stack:
        # First, since modes of this kind see the others being entered.
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if _has_autocast(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)():
            # Only the innermost hooks see a tensor: a checkpoint outside must not count ours.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        tracing = torch._C._get_tracing_state()
        if tracing is not None:
            set_state: Any = vars(torch._C)["_set_tracing_state"]
            set_state(None)
            stack.callback(set_state, tracing)
        if _is_in_transform():
            stack.enter_context(pyfunctorch.temporarily_clear_interpreter_stack())
        # Inside an operator autograd is off, whatever enable_grad says, and modes are on.
        stack.enter_context(torch._C._ForceDispatchKeyGuard(*_fresh_dispatch_state()))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    task: int = getattr(torch._C, "_current_graph_task_id", lambda: -1)()
    return task != -1


def _same(x: _T) -> _T:
    return x


def _is_in_transform() -> bool:
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
    return peek() is not None


@functools.cache
def _has_autocast(kind: str) -> bool:
    try:
        torch.autocast(kind, enabled=False)
    except RuntimeError:
        return False
    return True


@functools.cache
def _fresh_dispatch_state() -> tuple[Any, ...]:
    state: list[Any] = []

    def read() -> None:
        state.append(torch._C._dispatch_tls_local_include_set())
        state.append(torch._C._dispatch_tls_local_exclude_set())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    included, excluded = state
    # Whatever is included, some functions look for modes themselves.
    for key in ("Python", "PythonTLSSnapshot"):
        excluded = excluded | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return included, excluded
