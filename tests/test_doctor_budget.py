"""What `doctor` measures, in which order, and when it stops: a slow backend on a planted clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from padless import selection
from padless.diagnosis import backends as backends_module
from padless.diagnosis import questions
from padless.diagnosis.backends import ask_backends
from padless.diagnosis.child import NoAnswerError
from padless.diagnosis.need import REQUESTS, Budget, Usual, in_order_of_need, most_needed
from padless.diagnosis.report import Backend, Choice
from padless.qualification import expected_ms, forget_verdicts, qualify
from padless.qualification import verdict as verdict_module
from padless.selection import adapter, forget_selections
from planted_backends import FAULTS, flash_like, planted

CPU = torch.device("cpu")
NAMES = ("slow", "quick", "reference")
COMPILING_S = 6.0


class Clock:
    """Seconds that pass only when something lets them pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Verdicts take the time of this clock."""
    made = Clock()
    monkeypatch.setattr(verdict_module, "time", SimpleNamespace(perf_counter=made))
    forget_selections()
    yield made
    forget_selections()


class Slow:
    """A backend in half precision that compiles for each dtype, group of heads and direction."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._compiled = clock, set()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        kind = (q.dtype, q.shape[-1], q.shape[1] // k.shape[1], q.requires_grad)
        if kind not in self._compiled:
            self._compiled.add(kind)
            self._clock.now += COMPILING_S
        return flash_like(q, k, v, *rest, **options)


@pytest.fixture
def machine(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Lets a slow and a quick backend be all that there is."""

    def half(request: Any) -> str | None:
        return "needs half precision" if request.dtype == torch.float32 else None

    slow = planted(Slow(clock).attend, name="slow", reject=half)
    registry = {"slow": slow, "quick": planted(name="quick")}
    monkeypatch.setattr(selection, "BACKENDS", NAMES)
    monkeypatch.setattr(selection, "adapter", lambda name: registry.get(name) or adapter(name))
    return clock


def _ask_here(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[tuple[str, int]]:
    """Answers in this process, by the planted clock; lists what was measured, in order."""
    measured: list[tuple[str, int]] = []
    monkeypatch.setattr(questions, "Budget", lambda seconds, spent: Budget(seconds, spent, clock))
    monkeypatch.setattr(backends_module, "Budget", lambda seconds: Budget(seconds, clock=clock))

    def ask(question: str, argument: Any, *, limit_s: float) -> Iterator[Any]:
        # As a fresh process does: nothing is known but what is on disk.
        forget_verdicts()
        for found in questions._QUESTIONS[question](argument):
            if "measuring" in found:
                measured.append(tuple(found["measuring"]))
            yield found

    monkeypatch.setattr(backends_module, "ask", ask)
    return measured


def _number(shape: str, dtype: str, training: bool) -> int:
    return REQUESTS.index(Usual(shape, dtype, training))


def _doctor(
    seconds: float | None = None, **options: Any
) -> tuple[dict[str, Backend], dict[Usual, Choice]]:
    found, choices, _ = ask_backends("cpu", "bfloat16", (), 1.0, seconds=seconds, **options)
    by_request = {Usual(c.shape, c.dtype, c.training): c for c in choices}
    return {backend.name: backend for backend in found}, by_request


def test_by_default_the_most_needed_is_measured_and_of_the_rest_what_is_quick(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)
    backends, choices = _doctor()
    needed = [("slow", REQUESTS.index(usual)) for usual in most_needed("bfloat16")]
    assert measured[:2] == needed
    # The slow one is known to be slow by then; what takes no time goes on.
    assert {name for name, _ in measured[2:]} == {"quick"}
    assert machine.now == 2 * COMPILING_S
    assert backends["slow"] == Backend("slow", "partly", ("needs half precision",), 10)
    assert backends["quick"] == Backend("quick", "accepted")
    for usual in most_needed("bfloat16"):
        assert (choices[usual].backend, choices[usual].unmeasured) == ("slow", ())
    other = choices[Usual("llama-7b", "bfloat16", True)]
    # `quick` serves, but `auto` would try the slow one first: nobody knows.
    assert (other.backend, other.padded_head_dim, other.unmeasured) == (None, None, ("slow",))
    single = choices[Usual("llama-7b", "float32", True)]
    assert (single.backend, single.unmeasured) == ("quick", ())


def test_a_second_doctor_takes_what_is_on_disk_and_measures_no_more_by_default(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)
    first = _doctor()
    measured.clear()
    before = machine.now
    assert _doctor() == first
    assert measured == [] and machine.now == before


def test_with_a_budget_a_second_doctor_goes_on_where_the_first_stopped(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)
    order = [
        ("slow", number)
        for number in in_order_of_need("bfloat16")
        if REQUESTS[number].dtype != "float32"
    ]
    _doctor(7.0)
    # The second began before the budget was spent, and was not cut off; no third began.
    assert [pair for pair in measured if pair[0] == "slow"] == order[:2]
    assert machine.now == 2 * COMPILING_S
    measured.clear()
    _doctor(13.0)
    assert [pair for pair in measured if pair[0] == "slow"] == order[2:4]
    measured.clear()
    backends, choices = _doctor(math.inf)
    assert [pair for pair in measured if pair[0] == "slow"] == order[4:]
    assert backends["slow"] == Backend("slow", "partly", ("needs half precision",))
    assert not any(choice.unmeasured for choice in choices.values())


def test_nothing_is_measured_without_a_budget_and_nothing_is_said_of_it(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)
    backends, choices = _doctor(0.0)
    assert measured == [] and machine.now == 0.0
    assert backends["slow"] == Backend("slow", "unmeasured", ("needs half precision",), 12)
    assert backends["quick"] == Backend("quick", "unmeasured", (), 18)
    assert backends["reference"].status == "accepted"
    assert {choice.backend for choice in choices.values()} == {None}
    assert choices[Usual("llama-7b", "float32", True)].unmeasured == ("quick",)


def test_a_wrong_backend_is_wrong_though_not_all_is_measured(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask_here(monkeypatch, machine)
    wrong = planted(FAULTS["wrong_kv_head"], name="slow")
    monkeypatch.setattr(selection, "adapter", lambda n: wrong if n == "slow" else adapter(n))
    monkeypatch.setattr(selection, "BACKENDS", ("slow", "reference"))
    # It is measured at its own size of heads, then at larger ones, the last behind the budget.
    ticking = wrong.varlen

    def attend(*args: Any, **options: Any) -> Tensor:
        machine.now += 1.0
        return ticking(*args, **options)

    wrong.varlen = attend
    backends, _ = _doctor(5.5)
    assert backends["slow"].status == "wrong"
    assert "computes wrong here" in backends["slow"].reasons[0]
    assert backends["slow"].unmeasured > 0


def test_progress_says_what_is_measured_and_how_many_of_how_many(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask_here(monkeypatch, machine)
    told: list[tuple[str, int, int]] = []
    _doctor(on_progress=lambda *said: told.append(said))
    total = len(NAMES) * len(REQUESTS)
    assert {said[2] for said in told} == {total}
    assert told[0] == ("asking slow: llama-7b, bfloat16, inference", 0, total)
    measuring = [said for said in told if said[0].startswith("measuring")]
    # Known without a measurement: the slow one's 6 of float32, and the reference's 18.
    assert measuring[0] == ("measuring slow: llama3-8b, bfloat16, training", 24, total)
    assert measuring[1] == ("measuring slow: llama3-8b, bfloat16, inference", 25, total)


def test_a_crash_is_paid_from_the_same_budget(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)
    sound = backends_module.ask
    spent: list[list[float]] = []

    def ask(question: str, argument: Any, *, limit_s: float) -> Iterator[Any]:
        spent.append(argument["spent"])
        for found in sound(question, argument, limit_s=limit_s):
            yield found
            if found.get("measuring", [""])[0] == "slow":
                machine.now += 300.0
                raise NoAnswerError("no answer within 300 s")

    monkeypatch.setattr(backends_module, "ask", ask)
    backends, choices = _doctor(10.0)
    assert spent == [[0.0, 0.0], [300.0, 0.0]]
    assert backends["slow"].status == "crashed"
    assert backends["slow"].reasons == ("no answer within 300 s",)
    assert [pair[0] for pair in measured] == ["slow"]
    assert choices[most_needed("bfloat16")[0]].unmeasured == ("quick",)


def test_an_interrupt_leaves_what_was_found(
    machine: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = _ask_here(monkeypatch, machine)

    def tell(stage: str, done: int, total: int) -> None:
        if stage.startswith("measuring") and len(measured) == 2:
            raise KeyboardInterrupt

    found, choices, is_interrupted = ask_backends(
        "cpu", "bfloat16", (), 1.0, seconds=math.inf, on_progress=tell
    )
    assert is_interrupted
    assert [backend.status for backend in found] == ["partly", "unmeasured", "accepted"]
    assert found[0].unmeasured == 11
    known = [c for c in choices if c.backend == "slow"]
    assert [(c.shape, c.dtype, c.training) for c in known] == [most_needed("bfloat16")[0]]


def test_an_interrupt_before_any_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(question: str, argument: Any, *, limit_s: float) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(backends_module, "ask", ask)
    found, choices, is_interrupted = ask_backends("cpu", "float32", (), 1.0)
    assert (found, is_interrupted) == ((), True)
    assert {(choice.backend, choice.unmeasured) for choice in choices} == {(None, ())}


def test_a_measurement_is_expected_to_take_as_long_as_the_longest_before(clock: Clock) -> None:
    training, inference = (
        questions.usual_requests(CPU)[_number("llama3-8b", "bfloat16", kind)]
        for kind in (True, False)
    )
    backend, another = planted(Slow(clock).attend, name="slow"), planted(name="another")
    assert expected_ms(backend, training) == 0.0
    qualify(backend, training)
    # Of the other kind nothing is known yet.
    assert expected_ms(backend, training) == expected_ms(backend, inference) == 6000.0
    clock.now += 100.0
    qualify(planted(lambda *a, **o: flash_like(*a, **o), name="slow"), inference)
    assert expected_ms(backend, training) == 6000.0
    assert expected_ms(backend, inference) == 0.0
    assert expected_ms(another, training) == 0.0
    assert expected_ms(planted(name="slow", version="2.0"), training) == 0.0
    # Another process reads it.
    forget_verdicts()
    assert expected_ms(backend, training) == 6000.0
