"""`padless doctor` in 80 columns, with colour and without: nothing wider, nothing cut off."""

from __future__ import annotations

import io
import json
import math
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import diagnoses as on
import padless.diagnosis
from padless.cli import app
from padless.cli import doctor as command
from padless.cli.doctor_table import print_diagnosis
from padless.diagnosis.report import Backend, Diagnosis, Torch, Transformers
from padless.diagnosis.suggestions import find_next_step, find_warnings

LONG_PATH = "/a" * 60
MACHINES = {
    "none": on.machine(None),
    "A100": on.machine(on.A100),
    "H100": on.machine(on.H100),
    "H100 with FA4": on.machine(
        on.H100,
        backends=on.backends("fa4", "torch_varlen", "sdpa"),
        choices=on.choices("fa4", padded=192),
        variables={"CUDA_VISIBLE_DEVICES": "0", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"},
    ),
    "H100, not all measured": on.machine(
        on.H100,
        packages=on.packages(flash_attn_4=on.OK),
        backends=on.backends(
            "torch_varlen",
            "sdpa",
            fa4=Backend("fa4", "partly", ("needs float16 or bfloat16",), 10),
            fa2=Backend("fa2", "unmeasured", (), 10),
        ),
        choices=on.half_measured(),
        usual_dtype="bfloat16",
    ),
    "RTX 4090, broken": on.machine(
        on.RTX4090,
        packages=on.packages(flash_attn=on.broken()),
        backends=on.backends(
            "sdpa",
            fa2=Backend("fa2", "broken", (on.UNDEFINED,)),
            torch_varlen=Backend("torch_varlen", "partly", ("needs float16 or bfloat16",) * 2),
        ),
        choices=on.choices("torch_varlen", padded=256),
        variables={"LD_LIBRARY_PATH": LONG_PATH},
        cache=LONG_PATH,
    ),
    "T4": on.machine(on.T4, backends=on.backends("sdpa"), choices=on.choices("sdpa")),
    "B200": on.machine(on.B200),
    "MI300": on.machine(on.MI300, torch=on.ROCM),
    "wrong and crashing": on.machine(
        on.H100,
        backends=on.backends(
            "sdpa",
            fa4=Backend("fa4", "wrong", ("computes wrong here: dq of head 0 is off by 130 %",)),
            fa3=Backend("fa3", "crashed", ("the process died of SIGSEGV",)),
        ),
    ),
    "nothing": on.machine(
        None,
        torch=Torch(None, fault="ModuleNotFoundError: No module named 'torch'"),
        transformers=Transformers(None, "missing", tested=("4.28", "5.23")),
        backends=(),
        backends_fault="torch does not import",
        choices=(),
    ),
    "markup": on.machine(replace(on.A100, name="[red]GPU[/] [/nonsense]")),
    "old": on.machine(
        on.A100,
        transformers=replace(on.TRANSFORMERS, version="4.20.0", support="too old", era=None),
    ),
    "newer": on.machine(
        on.A100, transformers=replace(on.TRANSFORMERS, version="5.30.0", support="newer")
    ),
}

# With the advice that `doctor` gives.
MACHINES = {
    name: replace(found, warnings=find_warnings(found), next_step=find_next_step(found))
    for name, found in MACHINES.items()
}


def _print(found: Diagnosis, *, colour: bool = False) -> str:
    out = io.StringIO()
    # As where output goes to a file: no colour, and the width that the terminal would have.
    console = Console(
        file=out, width=80, force_terminal=colour, color_system="truecolor" if colour else None
    )
    print_diagnosis(found, console)
    return out.getvalue()


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("colour", [False, True], ids=["plain", "colour"])
@pytest.mark.parametrize("found", MACHINES.values(), ids=MACHINES.keys())
def test_it_fits_80_columns_and_cuts_nothing(found: Diagnosis, colour: bool) -> None:
    text = _print(found, colour=colour)
    assert ("\x1b[" in text) is colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in plain.splitlines()) <= 80
    assert "…" not in plain
    squeezed = _squeezed(plain)
    # Folded as they may be, the facts are all there.
    facts = [found.cache, found.padless, *found.variables.values(), found.next_step]
    facts += [gpu.name for gpu in found.gpus] + [b.name for b in found.backends]
    facts += [reason for b in found.backends for reason in b.reasons if b.status != "broken"]
    facts += [package.fault for package in found.packages]
    for fact in (*facts, *found.warnings):
        assert _squeezed(fact) in squeezed


def test_no_word_of_the_choices_is_broken() -> None:
    lines = _print(MACHINES["RTX 4090, broken"]).splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("What auto takes"))
    (row,) = (line for line in lines[title:] if line.strip().startswith("llama3-8b"))
    assert "torch_varlen" in row and "sdpa" in row


def test_a_row_says_where_forward_and_training_differ() -> None:
    mixed = tuple(
        replace(choice, backend="fa3" if choice.training else "fa4") for choice in on.choices("fa4")
    )
    assert "fa4 / fa3" in _print(on.machine(on.H100, choices=mixed))


@pytest.mark.parametrize(
    "name, words",
    [
        ("A100", ["NVIDIA A100-SXM4-80GB, compute capability 8.0, 80 GiB", "580.65.06"]),
        ("MI300", ["AMD Instinct MI300X, 192 GiB", "built for HIP 7.0"]),
        ("none", ["GPU not here CPU alone", "Attention runs here, on cpu."]),
        ("nothing", ["torch not here ModuleNotFoundError", "Nothing can run here.", "none BROKEN"]),
        ("wrong and crashing", ["fa4 WRONG computes wrong", "fa3 CRASHES the process"]),
        (
            "RTX 4090, broken",
            ["fa2 BROKEN its package does not import", "flash-attn BROKEN 2.8.3: import"],
        ),
        ("markup", ["[red]GPU[/] [/nonsense]"]),
        ("old", ["transformers TOO OLD 4.20.0", "on cuda:0, but there is no LLaMA to patch."]),
        ("newer", ["transformers newer 5.30.0"]),
        ("H100 with FA4", ["fa4 at 192", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE 1"]),
    ],
)
def test_it_says(name: str, words: list[str]) -> None:
    text = " ".join(_print(MACHINES[name]).split())
    for said in words:
        assert said in text


@pytest.mark.parametrize("name, code", [("A100", 0), ("none", 0), ("nothing", 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(name: str, code: int, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = MACHINES[name]
    monkeypatch.setattr(padless.diagnosis, "doctor", lambda **options: found)
    result = CliRunner().invoke(app, ["doctor", *(["--json"] if as_json else [])])
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    if as_json:
        assert json.loads(result.stdout) == found.as_dict()
    else:
        assert "Next: " in result.stdout


def test_help_says_what_the_exit_codes_mean() -> None:
    text = " ".join(CliRunner().invoke(app, ["doctor", "--help"]).output.split())
    assert "Exit code 0: some attention backend serves" in text
    assert "1: nothing can run" in text


LINE = "padless doctor: importing packages and measuring attention backends"


@pytest.mark.parametrize(
    "seconds, shown, terminal, expected",
    [
        (0.3, True, True, "measuring fa4: llama3-8b, bfloat16, training"),
        (0.0, True, True, ""),
        (0.3, False, True, ""),
        (0.3, True, False, LINE),
        (0.0, True, False, ""),
        (0.3, False, False, ""),
    ],
)
def test_progress_shows_after_a_while_a_bar_on_a_terminal_and_a_line_elsewhere(
    seconds: float, shown: bool, terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_PATIENCE_S", 0.05)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with command._progress(console, shown=shown) as on_progress:
        on_progress("importing torch and transformers", 0, 0)
        on_progress("measuring fa4: llama3-8b, bfloat16, training", 24, 126)
        time.sleep(seconds)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    if expected == LINE:
        assert text == LINE + "\n"
    elif expected:
        assert expected in text and "24/126" in text
    else:
        assert text.strip() == ""


def test_what_is_not_measured_says_so_and_how_to_measure_it() -> None:
    text = _print(MACHINES["H100, not all measured"])
    words = " ".join(text.split())
    assert "fa4 partly needs float16 or bfloat16 not measured yet, 10 of 18 usual requests" in words
    assert "fa2 open not measured yet" in words
    assert "20 of 126 answers of backends are not measured yet: `padless doctor --all`" in words
    (row,) = (line for line in text.splitlines() if line.strip().startswith("llama3-8b, 32/8"))
    assert "fa4" in row and "none" not in row
    assert "not measured yet" in words.split("llama-7b, 32/32 x 128")[1].split("llama3-8b")[0]


def test_an_interrupt_leaves_the_report_and_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(MACHINES["H100, not all measured"], is_interrupted=True)
    found = replace(found, next_step=find_next_step(found))
    monkeypatch.setattr(padless.diagnosis, "doctor", lambda **options: found)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 130
    words = " ".join(result.stdout.split())
    assert "Interrupted: this is what was found until then." in words
    assert "Next: run `padless doctor` again: it goes on where this one was interrupted" in words
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 130 and json.loads(result.stdout) == found.as_dict()


@pytest.mark.parametrize(
    "arguments, seconds",
    [
        ([], None),
        (["--seconds", "3"], 3.0),
        (["--seconds", "inf"], math.inf),
        (["--all"], math.inf),
        (["--all", "--seconds", "3"], math.inf),
    ],
    ids=str,
)
def test_the_budget_reaches_the_doctor(
    arguments: list[str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def doctor(**options: Any) -> Diagnosis:
        asked.append(options["seconds"])
        return MACHINES["none"]

    monkeypatch.setattr(padless.diagnosis, "doctor", doctor)
    assert CliRunner().invoke(app, ["doctor", *arguments]).exit_code == 0
    assert asked == [seconds]


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_typer_refuses_seconds_that_are_no_time(seconds: str) -> None:
    assert CliRunner().invoke(app, ["doctor", "--seconds", seconds]).exit_code == 2


def test_typer_refuses_a_limit_that_is_not_positive() -> None:
    result = CliRunner().invoke(app, ["doctor", "--time-limit", "0"])
    assert result.exit_code == 2
