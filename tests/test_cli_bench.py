"""`padless bench` as a command: exit codes, table, files, and one sentence for bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import padless
from padless import checkpoint
from padless.benchmark import run, timing, warmup
from padless.benchmark.distributions import read_lengths
from padless.benchmark.models import NAMED, Shape
from padless.benchmark.training_step import TrainingStep
from padless.cli import app
from padless.cli import bench as bench_module
from padless.errors import CheckpointError
from padless.verification import Check
from tiny_llama import write_llama_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    write_llama_folder(path)
    return path


def _run(out: Path, *arguments: object) -> Result:
    small = ("--batch", 3, "--seqlen", 16, "--seconds", 0.05, "--device", "cpu", "--out", out)
    return CliRunner().invoke(app, ["bench", *map(str, (*small, *arguments))])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _report(out: Path) -> padless.BenchReport:
    (path,) = out.glob("bench-*.json")
    return padless.BenchReport.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _assert_fits(text: str) -> None:
    # A path is not broken, however long.
    lines = [line for line in text.splitlines() if not line.startswith("written: ")]
    assert max(map(len, lines)) <= 80
    assert "…" not in text


def test_own_model_is_measured_and_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    result = _run(out, "--model", folder)
    assert result.exit_code == 0, result.output
    text = _one_line(result.stdout)
    assert "tiny-llama, float32 on" in text
    assert "3 rows up to 16 tokens, uniform, new lengths at every step" in text
    assert "numbers: verified, 8 checks ok" in text
    assert "unpatched is transformers' sdpa" in text and "padless: attention by sdpa" in text
    assert "flash_attention_2 runs on a CUDA device only" in text
    _assert_fits(result.stdout)
    report = _report(out)
    assert report.passed and report.row("eager").reason is None
    (image,) = out.glob("bench-*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    # The bar is for terminals; elsewhere a line a stage says what is waited for.
    stages = [line.removeprefix("padless bench: ") for line in result.stderr.splitlines()]
    assert stages[0] == "loading torch and transformers"
    assert [s for s in stages if s.startswith("verifying: patch")] == [
        "verifying: patch path: logits",
        "verifying: patch path: gradients",
        "verifying: patch path: 8 greedy tokens",
        "verifying: patch path: perturbation probe",
        "verifying: patch path: time of a step",
    ]
    assert not any("sdpa path" in stage or "flash path" in stage for stage in stages)
    for name in ("unpatched", "padless", "eager"):
        at = stages.index(f"warming up: {name}")
        assert stages[at + 1].startswith(f"warmed up: {name} in ")
    assert stages[-1] == "timing by turns" and stages.count("timing by turns") == 1


def test_on_a_terminal_stages_are_a_bar_and_nothing_is_left_of_it() -> None:
    from rich.console import Console

    out = io.StringIO()
    with bench_module._stages(Console(file=out, force_terminal=True, width=80)) as on_progress:
        on_progress("warming up: padless", 1, 3)
    assert "warming up: padless" in out.getvalue()
    assert "padless bench: " not in out.getvalue()


def test_large_numbers_and_long_reasons_fit(folder: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from padless.benchmark.report import BenchRow
    from padless.cli.bench_table import print_report

    row = BenchRow(
        "padless + Liger", None, 123456.0, 1200.0, 130000.0, 1234567.0, 75 * 2**30, 10.25, 0.25,
        ("flash_attn_4",), {"attention weights asked for": 2}, (1.0,), (0,),
    )  # fmt: skip
    failed = BenchRow("flash_attention_4", "ImportError: " + "no such thing here, and more " * 8)
    made = run.bench(
        checkpoint.load_llama(folder, dtype=torch.float32),
        batch=2, seqlen=8, seconds=0.01, peers=(), verify_first=False,
    )  # fmt: skip
    data = {**made.as_dict(), "model": "a model with quite a name " * 4}
    report = padless.BenchReport.from_dict(data)
    report = type(report)(**{**vars(report), "rows": (row, failed)})
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    _assert_fits(text)
    assert "123 s" in text and "1,200-130 s" in text and "1,234,567" in text
    assert "2 calls left to transformers: attention weights asked for" in _one_line(text)
    assert _one_line(text).count("no such thing here") == 8


def test_layers_are_cut(folder: Path, tmp_path: Path) -> None:
    result = _run(tmp_path, "--model", folder, "--layers", 1, "--no-verify", "--peers", "none")
    assert result.exit_code == 0, result.output
    assert "tiny-llama (first 1 layers)" in _one_line(result.stdout)
    assert "numbers: not verified" in result.stdout
    assert _report(tmp_path).shape["num_layers"] == 1
    result = _run(tmp_path, "--model", folder, "--layers", 3)
    assert result.exit_code == 2
    assert "num_layers must be in 1 to 2, the model's own, got 3" in _one_line(result.stderr)


def test_named_shape_without_weights_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise CheckpointError("not there")

    monkeypatch.setattr("padless.demo.prepare_demo_model", missing)
    monkeypatch.setitem(NAMED, "smollm2-135m", Shape(32, 4, 2, 5, 48, 64))
    result = _run(tmp_path, "--no-verify", "--peers", "none")
    assert result.exit_code == 0, result.output
    text = _one_line(result.stdout)
    assert "smollm2-135m (random weights, 4 of 5 layers)" in text
    assert _report(tmp_path).shape["num_layers"] == 4


@pytest.mark.parametrize("option", ["--forward", "--fixed-lengths"])
def test_other_steps_are_named(folder: Path, tmp_path: Path, option: str) -> None:
    result = _run(tmp_path, "--model", folder, "--no-verify", "--peers", "none", option)
    assert result.exit_code == 0, result.output
    wanted = {"--forward": "forward alone, 3 rows", "--fixed-lengths": "uniform, one batch"}
    assert wanted[option] in _one_line(result.stdout)


def test_own_lengths_in_both_forms(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    for text in ("3\n5\n\n16\n", "[3, 5, 16]"):
        file.write_text(text)
        result = _run(
            tmp_path, "--model", folder, "--no-verify", "--peers", "none", "--lengths", file
        )
        assert result.exit_code == 0, result.output
        assert "your lengths" in _one_line(result.stdout)
        assert set(_report(tmp_path).lengths_a_round[0]) == {3, 5, 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "lengths must hold at least one number of tokens, got none"),
        ("[]", "lengths must hold at least one number of tokens, got none"),
        ("4\n-3\n", "lengths must be whole numbers of tokens, 2 or more, got -3 as number 2 of 2"),
        ("4\nfour\n", "lengths must be whole numbers of tokens, 2 or more, got 'four' as number 2"),
        ("[4, 2.5]", "lengths must be whole numbers of tokens, 2 or more, got 2.5 as number 2"),
        ("[4, ", "lengths must be a JSON list, got"),
        ("4\n17\n", "lengths must be at most seqlen, 16, got 17 as number 2 of 2; raise seqlen"),
    ],
    ids=["empty", "empty list", "negative", "no number", "fraction", "broken", "too long"],
)
def test_bad_lengths_get_one_sentence(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "lengths"
    file.write_text(text)
    result = _run(tmp_path, "--model", folder, "--lengths", file)
    assert result.exit_code == 2
    assert message in _one_line(result.stderr)
    assert "Traceback" not in result.output and result.stdout == ""


def test_read_lengths_gives_whole_numbers(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text(" 7 \n9")
    assert read_lengths(file) == [7, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "sofa"], "--device must name a device torch knows, got 'sofa'"),
        (["--peers", "eager,vllm"], "peers must be of sdpa, eager, flash_attention_2"),
        (["--model", "llama-9b"], "--model must be a folder or one of llama-7b, llama3-8b"),
        (["--lengths", "no-such-file"], "No such file or directory: 'no-such-file'"),
    ],
)
def test_bad_usage_exits_2_in_one_sentence(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = _run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in _one_line(result.stderr)
    assert "Traceback" not in result.output


def test_out_that_is_no_folder_exits_2_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = _run(tmp_path / "file")
    assert result.exit_code == 2 and "File exists" in _one_line(result.stderr)


@pytest.mark.parametrize("turn", [1, 6 + 4], ids=["warming up", "second round"])
def test_interrupt_exits_130_with_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    taken: list[None] = []
    sound = timing.take

    def take(*args: Any, **kwargs: Any) -> None:
        if len(taken) == turn:
            raise KeyboardInterrupt
        taken.append(None)
        sound(*args, **kwargs)

    monkeypatch.setattr(timing, "take", take)
    monkeypatch.setattr(warmup, "take", take)
    result = _run(tmp_path, "--model", folder, "--no-verify", "--peers", "eager", "--seconds", 100)
    assert result.exit_code == 130, result.output
    assert "interrupted: what was measured until then" in _one_line(result.stdout)
    report = _report(tmp_path)
    assert report.is_interrupted
    steps = sorted(len(row.samples_ms) for row in report.rows)
    assert steps == ([0, 0, 0] if turn == 1 else [1, 1, 2])
    assert len(list(tmp_path.glob("*.png"))) == (turn != 1)
    assert ("of floor" in result.stdout) is (turn != 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_sigterm_exits_130_with_what_was_measured(folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", folder, "--peers", "eager", "--no-verify", "--seconds", 1000)
    small = ("--batch", 3, "--seqlen", 16, "--device", "cpu", "--out", tmp_path)
    command = [sys.executable, "-m", "padless", "bench", *map(str, (*small, *arguments))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line == "padless bench: timing by turns\n":
                break
        time.sleep(1.0)
        # As `timeout` and job managers do.
        child.terminate()
        out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "interrupted: what was measured until then" in _one_line(out)
    report = _report(tmp_path)
    assert report.is_interrupted
    assert all(len(row.samples_ms) > 1 for row in report.rows)
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert "Traceback" not in err


def test_what_was_measured_is_on_disk_before_the_compiler_begins(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[padless.BenchReport] = []

    def compiled(self: TrainingStep, **options: Any) -> Any:
        seen.append(_report(tmp_path))
        assert len(list(tmp_path.glob("*.png"))) == 1
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(TrainingStep, "compiled", compiled)
    result = _run(tmp_path, "--model", folder, "--no-verify", "--peers", "compile,eager")
    assert result.exit_code == 0, result.output
    (early,) = seen
    assert early.is_interrupted
    assert {row.name: len(row.samples_ms) > 0 for row in early.rows} == {
        "unpatched": True,
        "padless": True,
        "compile": False,
        "eager": True,
    }
    stages = [line.removeprefix("padless bench: ") for line in result.stderr.splitlines()]
    at = stages.index("timing by turns, before compile")
    assert stages[at + 1].startswith("written until now: ")
    assert "warming up: compile" in stages[at + 1 :]
    assert "not measured: compile: RuntimeError: no compiler here" in stages[at + 1 :]
    report = _report(tmp_path)
    assert not report.is_interrupted
    assert not list(tmp_path.glob("*.part"))
    assert "compile RuntimeError: no compiler here" in _one_line(result.stdout)


def test_the_limit_of_a_warm_up_reaches_the_benchmark(folder: Path, tmp_path: Path) -> None:
    result = _run(
        tmp_path, "--model", folder, "--no-verify", "--peers", "eager", "--warmup-seconds", 1e-9
    )
    assert result.exit_code == 0, result.output
    report = _report(tmp_path)
    assert [row.name for row in report.rows if row.reason is None] == ["unpatched", "padless"]
    said = "TooSlowError: its warm-up was not done after 0 s, and 1e-09 are allowed"
    assert report.row("eager").reason == f"{said}; raise warmup_seconds"
    assert f"padless bench: not measured: eager: {said}; raise" in result.stderr
    result = _run(tmp_path, "--model", folder, "--warmup-seconds", 0)
    assert result.exit_code == 2
    assert "warmup_seconds must be above 0, got 0.0" in _one_line(result.stderr)


def test_interrupt_while_loading_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "_load", interrupted)
    result = _run(tmp_path)
    assert result.exit_code == 130
    assert "interrupted before anything was measured" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_failed_verification_exits_1_and_times_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = (Check("logits, right pad", False, "RMS error 1e-1 (allowed 1e-5)"),)
    monkeypatch.setattr(run, "verified", lambda *_: failed)
    result = _run(tmp_path, "--model", folder)
    assert result.exit_code == 1
    text = _one_line(result.stdout)
    assert "The patched model is NOT the same model, so nothing was timed" in text
    assert "FAIL logits, right pad: RMS error 1e-1 (allowed 1e-5)" in text
    assert "of floor" not in text
    assert _report(tmp_path).rows == ()


def test_missing_matplotlib_leaves_the_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = _run(tmp_path, "--model", folder, "--no-verify", "--peers", "none")
    assert result.exit_code == 0, result.output
    assert 'no chart, since matplotlib is missing; pip install "padless[plot]"' in _one_line(
        result.stderr
    )
    assert len(list(tmp_path.glob("*.json"))) == 1 and not list(tmp_path.glob("*.png"))


def test_help_lists_every_option() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in ("--model", "--lengths", "--peers", "--no-verify", "--forward", "--out"):
        assert option in result.output
