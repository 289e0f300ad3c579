"""`padless.bench` leaves a model as it found it, and what it measured when it is interrupted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import padless
from bench_cases import interrupt_at, quick, tiny_model
from padless.benchmark import verified
from padless.unpadded import engagement


def _state(model: Any) -> list[Any]:
    doors = [sorted(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    weights = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    implementation = model.config._attn_implementation
    return [doors, modes, weights, implementation, torch.random.get_rng_state()]


def _assert_same(before: list[Any], after: list[Any]) -> None:
    assert before[0] == after[0] and before[1] == after[1] and before[3] == after[3]
    for (learns, grad, weight), (learns_now, grad_now, weight_now) in zip(
        before[2], after[2], strict=True
    ):
        assert learns == learns_now and torch.equal(weight, weight_now)
        assert grad is grad_now
    assert torch.equal(before[4], after[4])


def _watch_handles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    handles: list[Any] = []
    sound = engagement._handle

    def note(*args: Any, **kwargs: Any) -> Any:
        handles.append(sound(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(engagement, "_handle", note)
    return handles


@pytest.mark.parametrize("interrupted_at", [None, 0, 3, 8])
def test_nothing_stays_patched(monkeypatch: pytest.MonkeyPatch, interrupted_at: int | None) -> None:
    handles = _watch_handles(monkeypatch)
    if interrupted_at is not None:
        interrupt_at(monkeypatch, interrupted_at)
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    before = _state(model)
    report = quick(model, verify_first=interrupted_at is None)

    _assert_same(before, _state(model))
    assert report.is_interrupted is (interrupted_at is not None)
    assert handles or interrupted_at == 0
    assert not any(handle.is_engaged for handle in handles)


def test_a_patched_model_is_measured_unpatched_and_given_back_patched() -> None:
    model = tiny_model()
    with padless.patch(model) as handle:
        report = quick(model, peers=())
        assert report.passed
        assert handle.is_engaged and handle.report().forwards == 0
        model(
            input_ids=torch.tensor([[1, 2], [3, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]])
        )
        assert handle.report().forwards == 1


@pytest.mark.parametrize(
    ("turn", "done"),
    [(2, [0, 0, 0]), (6, [0, 0, 0]), (6 + 4, None)],
    ids=["warming up", "before the first step", "in the second round"],
)
def test_interrupt_leaves_the_steps_that_were_done(
    monkeypatch: pytest.MonkeyPatch, turn: int, done: list[int] | None
) -> None:
    interrupt_at(monkeypatch, turn)
    report = quick(seconds=100.0)

    counts = [len(row.samples_ms) for row in report.rows]
    assert report.is_interrupted
    if done is not None:
        assert counts == done
        reasons = {row.reason for row in report.rows}
        assert reasons == {"interrupted before its first step"}
    else:
        assert sorted(counts) == [1, 1, 2]
        assert len(report.lengths_a_round) == 2
        assert all(row.reason is None and row.speed_up for row in report.rows)
    assert padless.BenchReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_interrupt_while_verifying_leaves_an_empty_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verified, "verify", interrupted)
    report = quick(verify_first=True)
    assert report.is_interrupted and report.rows == () and report.checks == ()
