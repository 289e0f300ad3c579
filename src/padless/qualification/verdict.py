"""Whether a backend may serve a family of calls on this machine: measured once, then remembered."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import torch

from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.qualification.isolation import is_in_backward, isolated
from padless.qualification.judgement import Judgement, judge
from padless.qualification.probe import probed_heads, probed_window
from padless.qualification.record import describe_machine, read_records, write_record

_logger = logging.getLogger("padless")
_lock = threading.RLock()
_verdicts: dict[tuple[str, str], Verdict] = {}
_read: set[str] = set()
_WITH_GRADIENTS = "with gradients"


@dataclass(frozen=True)
class Verdict:
    """What the probes say of a backend, for one family of calls on one machine.

    Attributes:
        passed: whether it computes right.
        reason: what it computes wrong; empty if it passed.
        error: error over the size of the numbers, where it was nearest to its budget or over it.
        ratio: that error over its budget.
        elapsed_ms: time that the measurement took.
    """

    passed: bool
    reason: str
    error: float
    ratio: float
    elapsed_ms: float


def qualify(backend: ModuleType, request: AttentionRequest) -> Verdict:
    """Measures a backend against float64 on this machine, or recalls what was measured.

    Args:
        backend: an adapter that does not reject the request.
        request: of the family; a probe has its device, dtype, head_dim, groups of heads, causal,
            kind of window, determinism and gradients, and its own small shapes.

    Raises:
        BackendUnavailableError: the backend left the device unusable for this process.

    Note:
        The first call of a family takes some 20 ms and waits for the device; the next ones, and
        those of later processes with the same versions, recall its verdict. `PADLESS_REQUALIFY=1`
        measures again. It may be called in any mode, but not during the capture of a CUDA graph,
        and leaves the random numbers as they are. A backend that raises has failed.
    """
    if request.device.type == "meta":
        return Verdict(True, "", 0.0, 0.0, 0.0)
    with _alone():
        found = known_verdict(backend, request)
        if found is None:
            found = _measure(backend, request)
        return found


def known_verdict(backend: ModuleType, request: AttentionRequest) -> Verdict | None:
    """Recalls what was measured in this process or an earlier one; None if nothing was."""
    machine = _recalled(request.device)
    return _verdicts.get((machine, _family(backend, request)))


def expected_ms(backend: ModuleType, request: AttentionRequest) -> float:
    """Expects how long a measurement takes: as long as the longest of this backend until now.

    Args:
        backend: an adapter.
        request: of a family; those with gradients are compared with each other, and so are those
            without, as far as one of either has been measured.

    Returns:
        Milliseconds; 0 if nothing of this backend has been measured on this machine.
    """
    machine = _recalled(request.device)
    own = f"{backend.NAME} {backend.version()}, "
    found: dict[bool, list[float]] = {True: [], False: []}
    for (measured_on, family), verdict in _verdicts.items():
        if measured_on == machine and family.startswith(own):
            found[_WITH_GRADIENTS in family.split(", ")].append(verdict.elapsed_ms)
    return max(found[request.needs_grad] or found[not request.needs_grad], default=0.0)


def forget_verdicts() -> None:
    """Forgets every verdict of this process; the next question reads those on disk again."""
    _verdicts.clear()
    _read.clear()


def _recalled(device: torch.device) -> str:
    """Describes the machine, whose verdicts on disk are read by then."""
    machine = describe_machine(device)
    if machine not in _read:
        for family, record in read_records(machine).items():
            verdict = _from_record(record)
            if verdict is not None:
                _verdicts.setdefault((machine, family), verdict)
        _read.add(machine)
    return machine


def _family(backend: ModuleType, request: AttentionRequest) -> str:
    """Names everything of a request and a process that may change what is measured."""
    num_heads, num_kv_heads = probed_heads(request)
    left, right = probed_window(request)
    parts = [
        f"{backend.NAME} {backend.version()}",
        str(request.dtype).removeprefix("torch."),
        f"head_dim {request.head_dim}",
        f"heads {num_heads}/{num_kv_heads}",
        "causal" if request.causal else "not causal",
        f"window {left}/{right}",
        _WITH_GRADIENTS if request.needs_grad else "forward",
    ]
    if request.deterministic:
        parts.append("deterministic")
    if torch.are_deterministic_algorithms_enabled():
        # An operator without a deterministic form raises then, and is right otherwise.
        parts.append("deterministic algorithms")
    return ", ".join(parts)


def _measure(backend: ModuleType, request: AttentionRequest) -> Verdict:
    on_cuda = request.device.type == "cuda"
    if on_cuda:
        # What the caller's own kernels did wrong is not to be blamed on the backend.
        torch.cuda.synchronize(request.device)
    start = time.perf_counter()
    lasting = True
    try:
        with isolated(request.device):
            judgement = judge(backend.varlen, request)
    except Exception as error:
        # Anything may come out of a package that is built for something else. What is installed
        # beside it may change, and memory may be free the next time: for this process alone.
        lasting = False
        judgement = Judgement(f"raised {_first_line(error)}", math.inf, math.inf)
        if on_cuda and not _is_alive(request.device):
            verdict = _remember(backend, request, judgement, start, lasting=True)
            raise BackendUnavailableError(
                f"{backend.NAME} {verdict.reason} while it was measured, and CUDA cannot go on in "
                f"this process; start it again: {backend.NAME} is passed over then"
            ) from error
    return _remember(backend, request, judgement, start, lasting=lasting)


def _remember(
    backend: ModuleType,
    request: AttentionRequest,
    judgement: Judgement,
    start: float,
    *,
    lasting: bool,
) -> Verdict:
    elapsed_ms = 1000 * (time.perf_counter() - start)
    verdict = Verdict(
        not judgement.reason, judgement.reason, judgement.error, judgement.ratio, elapsed_ms
    )
    machine, family = describe_machine(request.device), _family(backend, request)
    _verdicts[machine, family] = verdict
    if lasting:
        write_record(machine, family, _to_record(verdict))
    _logger.debug(
        "%s: %s in %.0f ms", family, verdict.reason or f"right ({verdict.ratio:.2f})", elapsed_ms
    )
    return verdict


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    # Inside a backward pass there must be no waiting: who holds the lock may need this very thread
    # for gradients of its own. To measure twice does no harm.
    if not _lock.acquire(blocking=not is_in_backward()):
        yield
        return
    try:
        yield
    finally:
        _lock.release()


def _is_alive(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _to_record(verdict: Verdict) -> dict[str, Any]:
    # JSON has no infinity.
    return {name: None if x == math.inf else x for name, x in asdict(verdict).items()}


def _from_record(record: dict[str, Any]) -> Verdict | None:
    """Reads a verdict back; None if it is not one that was written here."""
    values = [record.get(field.name) for field in fields(Verdict)]
    passed, reason, *numbers = (math.inf if x is None else x for x in values)
    if not isinstance(passed, bool) or not isinstance(reason, str) or passed != (not reason):
        return None
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    return Verdict(passed, reason, *(float(number) for number in numbers))
