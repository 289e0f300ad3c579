"""Variants that are late or slow to warm up: what is measured without them, and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from padless.benchmark import warmup
from padless.benchmark.clock import Clock
from padless.benchmark.timing import measure
from padless.benchmark.variant import Timing, Variant

ROUNDS = 5


def _variant(log: list[str], name: str, act: Callable[[], None] = lambda: None) -> Any:
    """Makes what builds a variant that computes nothing and writes its name into a log."""

    def forward(inputs: Any) -> Any:
        act()
        log.append(name)
        return torch.zeros(()), None

    return lambda: Variant(forward=forward, is_differentiable=False)


def _measure(builders: dict[str, Any], into: list[Timing], **options: Any) -> dict[str, Timing]:
    # No time at all: each stage makes its fewest rounds.
    chosen = {"seconds": 1e-9, "warmup": 2, "min_rounds": ROUNDS, "sit_out_at_most": 1, **options}
    timings = measure(builders, Clock("cpu"), draw=lambda index: index, into=into, **chosen)
    return {timing.name: timing for timing in timings}


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets a minute of the warm-up's clock pass when it is called."""
    now = [0.0]
    monkeypatch.setattr(warmup, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes() -> None:
        now[0] += 60.0

    return passes


def _is_cut_short_at(limit: int) -> Callable[[], None]:
    taken: list[None] = []

    def act() -> None:
        taken.append(None)
        if len(taken) == limit:
            raise KeyboardInterrupt

    return act


def test_the_others_are_timed_before_a_late_one_is_built() -> None:
    log: list[str] = []
    into: list[Timing] = []
    seen: list[dict[str, int]] = []

    def before_late() -> None:
        seen.append({timing.name: len(timing.rounds) for timing in into})
        assert "late" not in log

    builders = {name: _variant(log, name) for name in ("a", "late", "b")}
    found = _measure(builders, into, late=("late",), before_late=before_late)
    assert len(seen) == 1
    assert seen[0]["late"] == 0 and seen[0]["a"] == seen[0]["b"] >= 1
    # All of them anew, in the same rounds; the order of rows is that of the builders.
    assert list(found) == ["a", "late", "b"]
    first = seen[0]["a"]
    for timing in found.values():
        assert timing.rounds[0] == first
        assert timing.rounds == found["late"].rounds
        assert len(timing.samples["forward"]) == len(timing.rounds)
    assert log[:4] == ["a", "a", "b", "b"]
    # By turns: each round has every one of them once.
    tail = log[-3 * len(found["late"].rounds) :]
    assert all(sorted(tail[at : at + 3]) == ["a", "b", "late"] for at in range(0, len(tail), 3))


def test_rounds_before_a_late_one_leave_it_its_own() -> None:
    log: list[str] = []
    builders = {"a": _variant(log, "a"), "late": _variant(log, "late")}
    found = _measure(builders, [], late=("late",), seconds=100.0, max_rounds=3)
    assert found["late"].reason is None
    assert found["late"].rounds == found["a"].rounds == [3, 4, 5]


def test_where_the_late_one_fails_nothing_is_dropped() -> None:
    def fails() -> Variant:
        raise RuntimeError("no compiler")

    log: list[str] = []
    found = _measure({"a": _variant(log, "a"), "late": fails}, [], late=("late",))
    assert found["late"].reason == "RuntimeError: no compiler"
    assert found["a"].rounds == list(range(len(found["a"].rounds)))
    assert len(found["a"].rounds) == log.count("a") - 2


@pytest.mark.parametrize("turn", [1, 2, 3], ids=["cold", "warm", "first round"])
def test_an_interrupt_of_the_late_one_keeps_what_was_measured(turn: int) -> None:
    log: list[str] = []
    into: list[Timing] = []
    builders = {
        "a": _variant(log, "a"),
        "late": _variant(log, "late", _is_cut_short_at(turn)),
    }
    with pytest.raises(KeyboardInterrupt):
        _measure(builders, into, late=("late",))
    a, late = into
    # Nothing of a warm-up counts, and nothing was dropped for a round that was not finished.
    assert a.rounds[0] == 0 and len(a.samples["forward"]) == len(a.rounds) >= 1
    assert late.rounds == [] and not late.samples


def test_a_slow_warm_up_is_given_up_between_two_turns(minute: Callable[[], None]) -> None:
    log: list[str] = []
    told: list[str] = []
    builders = {
        "a": _variant(log, "a", minute),
        "slow": _variant(log, "slow", minute),
        "b": _variant(log, "b"),
    }
    found = _measure(
        builders,
        [],
        warmup=3,
        warmup_limits={"slow": 100.0, "b": 100.0},
        on_progress=lambda stage, *_: told.append(stage),
    )
    # It was in its second turn when the limit came; the third is not begun.
    assert log.count("slow") == 2
    reason = (
        "TooSlowError: its warm-up was not done after 120 s, and 100 are allowed; "
        "raise warmup_seconds"
    )
    assert found["slow"].reason == reason
    assert f"not measured: slow: {reason}" in told
    # Without a limit of its own it may take what it takes, and the others go on.
    assert found["a"].reason is None and found["b"].reason is None
    assert "warmed up: a in 180.0 s" in told
    assert set(log[-4:]) == {"a", "b"}


def test_a_warm_up_that_ends_within_its_last_turn_takes_part(minute: Callable[[], None]) -> None:
    log: list[str] = []
    found = _measure({"a": _variant(log, "a", minute)}, [], warmup_limits={"a": 100.0})
    assert found["a"].reason is None and found["a"].rounds


def test_one_that_fails_in_a_round_is_told_and_the_stage_goes_on() -> None:
    log: list[str] = []
    told: list[str] = []

    def fails() -> None:
        if log.count("bad") == 3:
            raise RuntimeError("it broke")

    found = _measure(
        {"a": _variant(log, "a"), "bad": _variant(log, "bad", fails)},
        [],
        on_progress=lambda stage, *_: told.append(stage),
        seconds=1.0,
    )
    assert found["bad"].reason == "RuntimeError: it broke"
    at = told.index("not measured: bad: RuntimeError: it broke")
    assert told[at + 1 :] == ["timing by turns"] * len(told[at + 1 :]) != []
