"""Which backend serves a request, and why not the others: a pure function, with its trace."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError

# Fastest first; `auto` takes the first that does not reject the request.
BACKENDS = ("torch_varlen", "sdpa", "reference")


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to a request; `rejected` is the reason, None if it accepts."""

    name: str
    rejected: str | None


@dataclass(frozen=True)
class Selection:
    """The chosen backend with every candidate that was asked on the way."""

    name: str
    trace: tuple[Candidate, ...]


def adapter(name: str) -> ModuleType:
    """Imports the adapter of a backend."""
    return importlib.import_module(f"padless.backends.{name}")


def select_backend(request: AttentionRequest, backend: str = "auto") -> Selection:
    """Chooses the backend for a request.

    Args:
        request: what is asked.
        backend: a name, which is used or raises; or "auto".

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the named backend, or every one, rejects the request.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    names = BACKENDS if backend == "auto" else (backend,)
    trace = []
    for name in names:
        rejected = adapter(name).reject(request)
        trace.append(Candidate(name, rejected))
        if rejected is None:
            return Selection(name, tuple(trace))
    reasons = "; ".join(f"{c.name}: {c.rejected}" for c in trace)
    raise BackendUnavailableError(f"no backend can serve {request}: {reasons}")
