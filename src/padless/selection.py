"""Which backend serves a request, and why not the others: its answer, with the trace."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from padless.backends.request import AttentionRequest
from padless.environment import is_compiling
from padless.errors import BackendUnavailableError
from padless.qualification import forget_verdicts, known_verdict, qualify

# Fastest first; `auto` takes the first that accepts the request and computes it right.
BACKENDS = ("fa4", "fa3", "torch_varlen", "fa2", "sdpa", "fa1", "reference")
# What heads are padded to where a backend takes them in these sizes only, or is right in them only.
HEAD_DIMS = (64, 96, 128, 192, 256)

_logger = logging.getLogger("padless")


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to a request.

    Attributes:
        name: of the backend.
        head_dim: the size of heads that it was asked for.
        rejected: why it does not serve; None if it does.
    """

    name: str
    head_dim: int
    rejected: str | None


@dataclass(frozen=True)
class Selection:
    """The chosen backend, with every candidate that was asked on the way.

    Attributes:
        name: of the backend.
        head_dim: what q, k and v have to be padded to with zeros, the request's own as a rule. The
            scale of the scores stays that of the request.
        trace: the candidates, the chosen one last.
    """

    name: str
    head_dim: int
    trace: tuple[Candidate, ...]


# Every layer of every forward asks.
_selections: dict[tuple[AttentionRequest, str, bool], Selection] = {}
_said: set[tuple[Any, ...]] = set()


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
    _said.clear()
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
        reasons = "; ".join(_describe(candidate, request) for candidate in trace)
        raise BackendUnavailableError(f"no backend can serve {request}: {reasons}")
    selection = Selection(candidate.name, candidate.head_dim, tuple(trace))
    if backend == "auto":
        _warn_of_doubts(selection, request)
    else:
        _warn_of_named(selection, request)
    if not passing_over and not _is_open(selection):
        _selections[request, backend, False] = selection
    return selection


def _is_open(selection: Selection) -> bool:
    """Whether a backend was passed over that has yet to be measured: not to be remembered."""
    return any(_UNMEASURED == candidate.rejected for candidate in selection.trace)


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


_WRONG = "computes wrong here: "
UNMEASURED = "not measured yet"
_UNMEASURED = (
    "not measured yet, which it cannot be while a CUDA graph is captured; make the call once before"
)


def _trust(backend: ModuleType, request: AttentionRequest) -> None:
    return None


def _measure(backend: ModuleType, request: AttentionRequest) -> str | None:
    verdict = qualify(backend, request)
    return None if verdict.passed else _WRONG + verdict.reason


def _recall(backend: ModuleType, request: AttentionRequest) -> str | None:
    verdict = known_verdict(backend, request)
    if verdict is None:
        return _UNMEASURED
    return None if verdict.passed else _WRONG + verdict.reason


def _describe(candidate: Candidate, request: AttentionRequest) -> str:
    padded = candidate.head_dim != request.head_dim
    size = f" at head_dim {candidate.head_dim}" if padded else ""
    return f"{candidate.name}{size}: {candidate.rejected}"


def _warn_of_doubts(selection: Selection, request: AttentionRequest) -> None:
    """Says once which backends would have been faster, were they right, and what is used."""
    used = selection.name
    if selection.head_dim != request.head_dim:
        used += f" with heads padded from {request.head_dim} to {selection.head_dim}"
    told = set()
    for candidate in selection.trace:
        reason = candidate.rejected or ""
        if candidate.name not in told and (reason.startswith(_WRONG) or reason == _UNMEASURED):
            told.add(candidate.name)
            _warn_once(
                (candidate.name, candidate.head_dim, request.dtype, reason),
                f"{candidate.name} is passed over at head_dim {candidate.head_dim} in "
                f"{request.dtype}: {reason}; {used} serves instead",
            )
    if selection.name == "reference":
        _warn_once(
            ("reference", request.device.type, request.dtype),
            f"no kernel serves {request}, only the formula, which is slow and takes memory: "
            + "; ".join(_describe(c, request) for c in selection.trace[:-1]),
        )


def _warn_of_named(selection: Selection, request: AttentionRequest) -> None:
    asked = replace(request, head_dim=selection.head_dim)
    verdict = known_verdict(adapter(selection.name), asked)
    if verdict is not None and not verdict.passed:
        _warn_once(
            (selection.name, selection.head_dim, request.dtype, "named"),
            f"{selection.name} {_WRONG}{verdict.reason}; it is used because it was named",
        )


def _warn_once(key: tuple[Any, ...], message: str) -> None:
    if key not in _said:
        _said.add(key)
        _logger.warning("%s", message)
