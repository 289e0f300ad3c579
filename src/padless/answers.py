"""What backends answer to a request, and what of it people are told, once a process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from padless.backends.request import AttentionRequest
from padless.qualification import Verdict

WRONG = "computes wrong here: "
UNMEASURED = "not measured yet"
UNMEASURED_IN_CAPTURE = (
    "not measured yet, which it cannot be while a CUDA graph is captured; make the call once before"
)

_logger = logging.getLogger("padless")
_said: set[tuple[Any, ...]] = set()


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


def describe(candidate: Candidate, request: AttentionRequest) -> str:
    """Names a backend, the size of heads it was asked for if another, and its reason."""
    padded = candidate.head_dim != request.head_dim
    size = f" at head_dim {candidate.head_dim}" if padded else ""
    return f"{candidate.name}{size}: {candidate.rejected}"


def warn_of_doubts(selection: Selection, request: AttentionRequest) -> None:
    """Says once which backends would have been faster, were they right, and what is used."""
    used = selection.name
    if selection.head_dim != request.head_dim:
        used += f" with heads padded from {request.head_dim} to {selection.head_dim}"
    told = set()
    for candidate in selection.trace:
        reason = candidate.rejected or ""
        if candidate.name not in told and (
            reason.startswith(WRONG) or reason == UNMEASURED_IN_CAPTURE
        ):
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
            + "; ".join(describe(c, request) for c in selection.trace[:-1]),
        )


def warn_of_named(selection: Selection, request: AttentionRequest, verdict: Verdict | None) -> None:
    """Says once that a named backend is used although it is known to be wrong."""
    if verdict is not None and not verdict.passed:
        _warn_once(
            (selection.name, selection.head_dim, request.dtype, "named"),
            f"{selection.name} {WRONG}{verdict.reason}; it is used because it was named",
        )


def forget_said() -> None:
    """Forgets what was said, so that it is said again."""
    _said.clear()


def _warn_once(key: tuple[Any, ...], message: str) -> None:
    if key not in _said:
        _said.add(key)
        _logger.warning("%s", message)
