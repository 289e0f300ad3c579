"""Which backend serves a request, and why not the others: its answer, with the trace."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from padless.answers import (
    UNMEASURED,
    UNMEASURED_IN_CAPTURE,
    WRONG,
    Candidate,
    Selection,
    describe,
    forget_said,
    warn_of_doubts,
    warn_of_named,
)
from padless.backends.request import AttentionRequest
from padless.environment import is_compiling
from padless.errors import BackendUnavailableError
from padless.qualification import forget_verdicts, known_verdict, qualify

# Fastest first; `auto` takes the first that accepts the request and computes it right.
BACKENDS = ("fa4", "fa3", "torch_varlen", "fa2", "sdpa", "fa1", "reference")
# What heads are padded to where a backend takes them in these sizes only, or is right in them only.
HEAD_DIMS = (64, 96, 128, 192, 256)

# Every layer of every forward asks.
_selections: dict[tuple[AttentionRequest, str, bool], Selection] = {}


def adapter(name: str) -> ModuleType:
    """Imports the adapter of a backend."""
    return importlib.import_module(f"padless.backends.{name}")


def select_backend(
    request: AttentionRequest,
    backend: str = "auto",
    *,
    passing_over: Mapping[str, str] | None = None,
    little_work: bool = False,
) -> Selection:
    """Chooses the backend for a request.

    Args:
        request: what is asked.
        backend: a name, which is used or raises; or "auto", which takes the first backend that
            accepts the request and computes it right.
        passing_over: backends that "auto" must not take, with the reason.
        little_work: whether the device is done before the host has launched the next kernel: then
            "auto" prefers what is launched quickly.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the named backend, or every one, rejects the request.

    Note:
        The first "auto" of a kind of request measures backends (`padless.qualification`); then the
        answer is remembered, also under other modes of torch. While a CUDA graph is captured
        nothing is measured, and a backend that was not before is passed over.
    """
    if is_compiling():
        return _select_while_tracing(
            request.device,
            request.dtype,
            _SIZES[request.head_dim],
            _SIZES[request.num_heads],
            _SIZES[request.num_kv_heads],
            request.causal,
            request.window_size,
            request.deterministic,
            request.needs_grad,
            backend,
        )
    if passing_over:
        return _select(request, backend, passing_over)
    little_work = little_work and backend == "auto"
    found = _selections.get((request, backend, little_work))
    if found is not None:
        return found
    if not little_work:
        return _select(request, backend, {})
    found = _select_quick(request) or _select(request, backend, {})
    if not _is_open(found):
        _selections[request, backend, True] = found
    return found


def ask_backend(
    name: str,
    request: AttentionRequest,
    may_measure: Callable[[ModuleType, AttentionRequest], bool],
) -> Candidate:
    """Asks one backend what "auto" would ask it, with a say in what is measured.

    Args:
        name: of the backend.
        request: what is asked.
        may_measure: is asked in front of each measurement, with the adapter and the request.

    Returns:
        Its answer: for the first size of heads at which it serves; else for the request's own. With
        `rejected` at `UNMEASURED` it is not known yet.
    """

    def doubt(backend: ModuleType, asked: AttentionRequest) -> str | None:
        if known_verdict(backend, asked) is None and not may_measure(backend, asked):
            return UNMEASURED
        return _measure(backend, asked)

    first = None
    for candidate in _ask(name, request, _trust if name == "reference" else doubt):
        if candidate.rejected in (None, UNMEASURED):
            return candidate
        first = first or candidate
    assert first is not None  # a backend answers for the request's own size in any case
    return first


def forget_selections() -> None:
    """Forgets every answer, what was logged of it, and the verdicts behind it, those on disk not.

    For what changes while a process runs: a package that was installed, and tests.
    """
    _selections.clear()
    forget_said()
    forget_verdicts()


# To index by a symbolic size makes it a constant of the compiled code.
_SIZES = tuple(range(4097))


def _select_while_tracing(*arguments: Any) -> Selection:
    """Answers while torch.compile traces, from constants and as a constant of the graph."""
    *fields, backend = arguments
    request = AttentionRequest(*fields)
    found = _selections.get((request, backend, False))
    return _select(request, backend, {}) if found is None else found


# What torch.compiler.assume_constant_result sets, which would import the whole compiler for it.
_select_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _select(request: AttentionRequest, backend: str, passing_over: Mapping[str, str]) -> Selection:
    if backend == "auto":
        answers = _ask_all(request, passing_over)
    elif backend in BACKENDS:
        answers = _ask(backend, request, _trust)
    else:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    trace: list[Candidate] = []
    for candidate in answers:
        trace.append(candidate)
        if candidate.rejected is None:
            break
    else:
        reasons = "; ".join(describe(candidate, request) for candidate in trace)
        raise BackendUnavailableError(f"no backend can serve {request}: {reasons}")
    selection = Selection(candidate.name, candidate.head_dim, tuple(trace))
    if backend == "auto":
        warn_of_doubts(selection, request)
    else:
        asked = replace(request, head_dim=selection.head_dim)
        warn_of_named(selection, request, known_verdict(adapter(selection.name), asked))
    if not passing_over and not _is_open(selection):
        _selections[request, backend, False] = selection
    return selection


def _is_open(selection: Selection) -> bool:
    """Whether a backend was passed over that has yet to be measured: not to be remembered."""
    return any(UNMEASURED_IN_CAPTURE == candidate.rejected for candidate in selection.trace)


_LITTLE = "so few tokens are done sooner by what takes the host less time to launch"


def _select_quick(request: AttentionRequest) -> Selection | None:
    """Chooses without the backends that are slow to launch; None if that leaves no quick one.

    Those are not even imported, nor measured, which takes seconds where kernels are compiled.
    """
    slow = [name for name in BACKENDS if getattr(adapter(name), "SLOW_TO_LAUNCH", False)]
    selection = _select(request, "auto", dict.fromkeys(slow, _LITTLE)) if slow else None
    if selection is None or selection.head_dim != request.head_dim:
        return None
    if not getattr(adapter(selection.name), "QUICK_TO_LAUNCH", False):
        return None
    return selection


def _ask_all(request: AttentionRequest, passing_over: Mapping[str, str]) -> Iterator[Candidate]:
    capturing = request.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    for name in BACKENDS:
        if name in passing_over:
            yield Candidate(name, request.head_dim, passing_over[name])
        elif name == "reference":
            # What the others are measured by, and there when none of them is right.
            yield from _ask(name, request, _trust)
        else:
            yield from _ask(name, request, _recall if capturing else _measure)


def _ask(
    name: str,
    request: AttentionRequest,
    doubt: Callable[[ModuleType, AttentionRequest], str | None],
) -> Iterator[Candidate]:
    """Asks a backend for the request's head_dim, then for larger ones that it accepts."""
    backend = adapter(name)
    for head_dim in (request.head_dim, *(d for d in HEAD_DIMS if d > request.head_dim)):
        asked = replace(request, head_dim=head_dim)
        rejected = backend.reject(asked)
        if rejected is None:
            yield Candidate(name, head_dim, doubt(backend, asked))
        elif head_dim == request.head_dim:
            yield Candidate(name, head_dim, rejected)


def _trust(backend: ModuleType, request: AttentionRequest) -> None:
    return None


def _measure(backend: ModuleType, request: AttentionRequest) -> str | None:
    verdict = qualify(backend, request)
    return None if verdict.passed else WRONG + verdict.reason


def _recall(backend: ModuleType, request: AttentionRequest) -> str | None:
    verdict = known_verdict(backend, request)
    if verdict is None:
        return UNMEASURED_IN_CAPTURE
    return None if verdict.passed else WRONG + verdict.reason
