"""`padless.bench`: what it times, in which order, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import padless
from bench_cases import interrupt_at, quick, tiny_model
from padless.benchmark import run
from padless.benchmark.clock import Clock, measure_ceilings
from padless.benchmark.models import sharing_copy, step_flops
from padless.benchmark.training_step import TrainingStep


@pytest.fixture(scope="module")
def report() -> padless.BenchReport:
    return quick(verify_first=True)


def test_rows_have_every_figure(report: padless.BenchReport) -> None:
    assert [row.name for row in report.rows] == ["unpatched", "padless", "eager"]
    assert report.passed and not report.is_interrupted
    unpatched = report.rows[0]
    for row in report.rows:
        assert row.reason is None
        assert len(row.samples_ms) == len(row.rounds) == len(report.lengths_a_round) >= 1
        assert row.median_ms == pytest.approx(statistics.median(row.samples_ms))
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        tokens = sum(sum(report.lengths_a_round[at]) for at in row.rounds)
        assert row.tokens_per_s == pytest.approx(1e3 * tokens / sum(row.samples_ms))
        assert row.speed_up == pytest.approx(unpatched.median_ms / row.median_ms)
        assert row.floor_share == pytest.approx(report.floor_ms / row.median_ms)
        assert row.peak_bytes is None
    assert report.row("padless").backends == ("sdpa",)
    assert report.row("padless").left_to_stock is None
    assert unpatched.backends == ()
    assert report.attention == "sdpa"


def test_numbers_are_verified_first(report: padless.BenchReport) -> None:
    assert len(report.checks) >= 6
    assert all(check.passed for check in report.checks)


def test_floor_is_the_work_on_real_tokens_at_the_ceiling(report: padless.BenchReport) -> None:
    shape = run.Shape.of_config(tiny_model().config)
    flops = statistics.median(step_flops(shape, lengths) for lengths in report.lengths_a_round)
    assert report.floor_ms == pytest.approx(flops / report.ceilings["matmul_tflops"] / 1e9)
    # Forward alone is a third of the products, and less of attention.
    alone = step_flops(shape, (16, 3), backward=False)
    assert step_flops(shape, (16, 3)) / 3.5 < alone < step_flops(shape, (16, 3)) / 3


def test_what_a_cpu_does_at_most_is_not_what_it_does_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock("cpu")
    times = itertools.cycle([9.0, 2.0, 8.0])
    monkeypatch.setattr(clock, "elapsed_ms", lambda start, end: next(times))
    assert measure_ceilings(clock, smoke=True).matmul_tflops == pytest.approx(
        2 * 128**3 / 2.0 / 1e9
    )


def test_report_is_the_same_after_a_way_through_json(report: padless.BenchReport) -> None:
    data = json.loads(json.dumps(report.as_dict()))
    assert padless.BenchReport.from_dict(data) == report
    assert data["passed"] is True and data["hardware"]["kind"] == "cpu"
    with pytest.raises(ValueError, match="data must be a bench report of format 1, got 'step'"):
        padless.BenchReport.from_dict({**data, "name": "step"})


def test_every_variant_takes_a_turn_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = interrupt_at(monkeypatch, 6 + 3 * 5)
    report = quick(seconds=100.0)

    names = ["unpatched", "padless", "eager"]
    warm, turns = taken[:6], taken[6:]
    assert warm == [name for name in names for _ in range(2)]
    rounds = [turns[at : at + 3] for at in range(0, len(turns), 3)]
    assert len(rounds) == 5
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len(set(map(tuple, rounds))) > 1, "the order of turns never changes"
    assert [row.rounds for row in report.rows] == [tuple(range(5))] * 3


def test_slow_variants_do_not_sit_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowed(model: Any, attention: str | None = None) -> Any:
        made = sharing_copy(model, attention)
        if attention == "eager":
            made.register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return made

    monkeypatch.setattr("padless.benchmark.training_step.sharing_copy", slowed)
    report = quick(seconds=1.0)
    assert len({row.rounds for row in report.rows}) == 1
    assert len(report.rows[0].rounds) > 1


def test_lengths_are_new_in_every_round_unless_fixed() -> None:
    new = quick(seconds=0.5, peers=())
    assert len(set(new.lengths_a_round)) == len(new.lengths_a_round) > 1
    fixed = quick(seconds=0.5, peers=(), fixed_lengths=True)
    assert len(set(fixed.lengths_a_round)) == 1 < len(fixed.lengths_a_round)
    full = quick(peers=(), distribution="full")
    assert set(full.lengths_a_round) == {(16, 16, 16)} and full.padding == 0.0
    again = quick(seconds=0.5, peers=(), seed=1)
    assert again.lengths_a_round[0] != new.lengths_a_round[0]


def test_own_lengths_are_all_dealt_out() -> None:
    report = quick(lengths=[2, 3, 4, 5, 6, 7], seqlen=None, batch=2, peers=(), seconds=1.0)
    assert report.seqlen == 7 and report.lengths_from == "lengths"
    # Two rounds of warm-up, then every third round all six are dealt.
    dealt = [length for lengths in report.lengths_a_round[1:4] for length in lengths]
    assert sorted(dealt) == [2, 3, 4, 5, 6, 7]


def test_forward_alone_runs_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[bool, bool]] = []
    sound = TrainingStep._variant

    def variant(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        made = sound(self, model, *args, **kwargs)
        forward = made.forward
        made.forward = lambda inputs: (
            modes.append((torch.is_grad_enabled(), model.training)) or forward(inputs)
        )
        return made

    monkeypatch.setattr(TrainingStep, "_variant", variant)
    report = quick(forward_only=True)
    assert report.passed and report.is_forward_only
    assert set(modes) == {(False, False)}
    modes.clear()
    assert quick().passed
    assert set(modes) == {(True, True)}


def test_failed_verification_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    from padless.verification import measure

    sound = measure.judge

    def faulty(name: str, tensors: Any) -> Any:
        return sound(name, {n: (got * 1.01, *rest) for n, (got, *rest) in tensors.items()})

    monkeypatch.setattr(measure, "judge", faulty)
    report = quick(verify_first=True)
    assert not report.passed and not report.is_interrupted
    assert report.rows == () and report.ceilings is None
    assert any(not check.passed for check in report.checks)
    assert quick(verify_first=False).passed


def test_failing_peers_are_rows_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, attention: str | None = None) -> Any:
        if attention == "eager":
            raise torch.OutOfMemoryError("tried to allocate a lot")
        return sharing_copy(model, attention)

    monkeypatch.setattr("padless.benchmark.training_step.sharing_copy", broken)
    report = quick(peers=("eager", "flash_attention_2", "liger"))
    reasons = {row.name: row.reason for row in report.rows}
    where = "runs on a CUDA device only, and the model is on cpu"
    assert reasons == {
        "unpatched": None,
        "padless": None,
        "eager": "out of memory",
        "flash_attention_2": where,
        "unpatched + Liger": where,
        "padless + Liger": where,
    }
    assert report.passed


def test_wrong_numbers_of_padless_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = TrainingStep._figures

    def figures(self: Any, loss: torch.Tensor) -> dict[str, float]:
        found = sound(self, loss)
        return {**found, "loss": found["loss"] * (1.0 if self.truth is None else 1.5)}

    monkeypatch.setattr(TrainingStep, "_figures", figures)
    report = quick(peers=())
    assert report.row("padless").reason.startswith("wrong numbers: loss")
    assert not report.passed


def test_model_that_does_not_learn_is_timed_forward_only() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="got none; give forward_only=True"):
        quick(model)
    assert quick(model, forward_only=True, peers=()).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seqlen": 1}, "seqlen must be at least 2 tokens, got 1"),
        ({"seconds": 0.0}, r"seconds must be above 0, got 0\.0"),
        ({"peers": ("vllm",)}, "peers must be of sdpa, eager, .*, got 'vllm'"),
        ({"distribution": "normal"}, "distribution must be one of uniform, .*, got 'normal'"),
        ({"lengths": [4, 17]}, "lengths must be at most seqlen, 16, got 17 as number 2 of 2"),
        ({"lengths": [], "seqlen": None}, "lengths must hold at least one number of tokens"),
    ],
)
def test_bad_arguments_get_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**options)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a torch module, got str"):
        padless.bench("llama")  # type: ignore[arg-type]
    with pytest.raises(padless.UnsupportedError, match="model must be a LLaMA"):
        padless.bench(torch.nn.Linear(2, 2))


def test_chart_is_an_image_of_sane_size(report: padless.BenchReport, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    from padless.benchmark.chart import draw_chart

    height, width, _ = image.imread(draw_chart(report, tmp_path / "bench.png")).shape
    assert 1000 <= width <= 2000 and 300 <= height <= 900


def test_chart_has_room_for_a_row_that_was_disturbed(
    report: padless.BenchReport, tmp_path: Path
) -> None:
    image = pytest.importorskip("matplotlib.image")
    from padless.benchmark.chart import draw_chart

    def width(made: padless.BenchReport) -> int:
        return image.imread(draw_chart(made, tmp_path / "bench.png")).shape[1]

    row = report.row("padless")
    disturbed = replace(row, p80_ms=5 * max(found.p80_ms for found in report.rows))
    # A label that stands outside of the axes would make the image wider.
    assert width(replace(report, rows=(disturbed,))) == width(replace(report, rows=(row,)))
