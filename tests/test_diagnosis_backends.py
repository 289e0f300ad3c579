"""Backends asked one by one answer as `auto` would have it, also if one ends its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnoses import OK, broken, packages
from kernel_stand_ins import forget, install
from padless import selection
from padless.answers import UNMEASURED
from padless.diagnosis import backends as backends_module
from padless.diagnosis import questions
from padless.diagnosis.backends import ask_backends
from padless.diagnosis.child import NoAnswerError
from padless.diagnosis.need import REQUESTS as REQUESTS_IN_ORDER
from padless.diagnosis.need import Usual
from padless.selection import (
    BACKENDS,
    ask_backend,
    forget_selections,
    select_backend,
)
from planted_backends import FAULTS, planted

REQUESTS = 18


def _always(*_: Any) -> bool:
    return True


WRONG = "computes wrong here: dq of head 0 is off by 130 %"
Reject = Callable[[str, int], str | None]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.parametrize("installed", [None, "fa4", "fa2"])
def test_asked_one_by_one_they_choose_what_auto_takes(
    installed: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        install(monkeypatch, installed)
    for request in questions.usual_requests(torch.device("cpu"))[::5]:
        answers = {name: questions._ask_one(name, request, _always) for name in BACKENDS}
        forget_selections()
        auto = select_backend(request)
        first = next(name for name in BACKENDS if answers[name]["rejected"] is None)
        assert (first, answers[first]["head_dim"]) == (auto.name, auto.head_dim)
        for candidate in auto.trace[:-1]:
            if candidate.name != first:
                assert answers[candidate.name]["rejected"] is not None


def test_a_backend_that_is_wrong_says_by_how_much(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "fa4")
    from padless.backends import fa4

    right = fa4.varlen
    monkeypatch.setattr(fa4, "varlen", lambda *args, **options: 1.05 * right(*args, **options))
    request = questions.usual_requests(torch.device("cpu"))[0]
    answer = questions._ask_one("fa4", request, _always)
    assert answer["rejected"].startswith("computes wrong here: ")
    assert "times its budget" in answer["rejected"]


def _pretend(
    monkeypatch: pytest.MonkeyPatch, reject: Reject, dies_at: tuple[str, ...] = ()
) -> list[Any]:
    """Puts a child that dies while it asks some backends for the fourth request."""
    started: list[Any] = []

    def ask(question: str, argument: Any, *, limit_s: float) -> Iterator[Any]:
        started.append(argument)
        yield {"backends": list(BACKENDS)}
        for name in BACKENDS:
            for number in range(REQUESTS):
                if (name, number) in set(argument["done"]):
                    continue
                yield {"asking": [name, number]}
                if name in dies_at and number == 3:
                    raise NoAnswerError("the process died of SIGSEGV")
                yield {"asked": [name, number], "rejected": reject(name, number), "head_dim": 128}

    monkeypatch.setattr(backends_module, "ask", ask)
    return started


def test_one_that_ends_the_process_does_not_silence_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = _pretend(monkeypatch, lambda name, number: None, dies_at=("fa4", "torch_varlen"))
    found, choices, _ = ask_backends("cuda:0", "bfloat16", packages(flash_attn_4=OK), 1.0)
    by_name = {backend.name: backend for backend in found}
    assert len(started) == 3
    assert [b.name for b in found] == list(BACKENDS)
    assert by_name["fa4"].status == by_name["torch_varlen"].status == "crashed"
    assert by_name["fa4"].reasons == ("the process died of SIGSEGV",)
    assert by_name["fa3"].status == by_name["sdpa"].status == "accepted"
    assert {choice.backend for choice in choices} == {"fa3"}


def test_broken_packages_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    started = _pretend(monkeypatch, lambda name, number: None)
    found, *_ = ask_backends("cuda:0", "bfloat16", packages(flash_attn=broken("OSError: x")), 1.0)
    by_name = {backend.name: backend for backend in found}
    assert {name for name, _ in started[0]["done"]} == {"fa1", "fa2"}
    assert by_name["fa1"].status == by_name["fa2"].status == "broken"
    assert by_name["fa2"].reasons == ("OSError: x",)


def test_status_tells_missing_from_unfit_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(name: str, number: int) -> str | None:
        if name in ("fa3", "fa1"):
            # fa1 says first that it has no grouped heads.
            return "needs as many KV heads as heads" if number % 2 else "import x failed: y"
        if name == "fa2":
            return "needs compute capability 8.0, got (7, 5)"
        if name == "fa4":
            return WRONG
        return "needs float16 or bfloat16" if name == "torch_varlen" and number > 3 else None

    _pretend(monkeypatch, reject)
    found, choices, _ = ask_backends("cuda:0", "bfloat16", packages(flash_attn_4=OK), 1.0)
    by_name = {backend.name: backend for backend in found}
    assert (by_name["fa4"].status, by_name["fa4"].reasons) == ("wrong", (WRONG,))
    assert by_name["fa3"].status == by_name["fa1"].status == "missing"
    assert by_name["fa3"].reasons == ("flash-attn-3 is not installed",)
    assert by_name["fa2"].status == "unfit"
    assert by_name["torch_varlen"].status == "partly"
    assert by_name["torch_varlen"].reasons == ("needs float16 or bfloat16",)
    assert [choice.backend for choice in choices[:6]] == ["torch_varlen"] * 4 + ["sdpa"] * 2


def test_a_child_that_asks_nothing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(question: str, argument: Any, *, limit_s: float) -> Iterator[Any]:
        raise NoAnswerError("ImportError: x")
        yield

    monkeypatch.setattr(backends_module, "ask", ask)
    with pytest.raises(NoAnswerError, match="ImportError: x"):
        ask_backends("cpu", "float32", packages(), 1.0)


def test_larger_heads_are_not_measured_behind_the_budget(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer may take several measurements: each of them needs leave."""
    usual = Usual("smollm2-135m", "bfloat16", training=True)
    request = questions.usual_requests(torch.device("cpu"))[REQUESTS_IN_ORDER.index(usual)]
    wrong = planted(FAULTS["wrong_kv_head"], name="slow")
    asked: list[int] = []

    def may_measure(backend: Any, request: Any) -> bool:
        asked.append(request.head_dim)
        return len(asked) < 3

    monkeypatch.setattr(selection, "adapter", lambda name: wrong)
    assert ask_backend("slow", request, may_measure).rejected == UNMEASURED
    assert asked == [64, 96, 128]
    # What is on record needs no leave.
    found = ask_backend("slow", request, lambda *_: False)
    assert (found.rejected, found.head_dim) == (UNMEASURED, 128)
