"""`padless verify` as a command: exit codes, both outputs, and one sentence for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from padless.cli import app
from padless.llama import attend, paths
from padless.llama import engage as engage_module
from tiny_llama import edit_json, write_llama_folder

TEXTS = "the cat sat on the mat\nthe mat\nsat on the cat\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    write_llama_folder(path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS)
    return path


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def test_same_model_exits_0_with_a_table(folder: Path, texts: Path) -> None:
    result = _run("--model", folder, "--batch", texts, "--new-tokens", 4)
    assert result.exit_code == 0, result.output
    text = _one_line(result.stdout)
    assert "tiny-llama (LlamaForCausalLM), float32 on cpu" in text
    assert "batch of 3 x 6: 12 tokens, 33% padding; truth: the same model in float64" in text
    assert "all 12 equal over 4 steps" in text
    assert "2 of 2 attention layers went through padless" in text
    assert "12 of 18" in text and "18 of 18" in text
    assert "The patched model is the same model" in text
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_json_holds_the_whole_report(folder: Path, texts: Path) -> None:
    result = _run(
        "--model", folder, "--batch", texts, "--new-tokens", 2, "--path", "flash", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert [path["path"] for path in data["paths"]] == ["flash"]
    assert data["paths"][0]["computed_tokens"] == 12
    assert set(data["versions"]) == {"padless", "torch", "transformers", "python"}


def test_dtype_and_default_texts_of_the_users_own_model(folder: Path, texts: Path) -> None:
    result = _run("--model", folder, "--batch", texts, "--new-tokens", 2, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu" in result.stdout and "in float32" in _one_line(result.stdout)


def test_another_model_exits_1(folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attend_flash", "attend_2"):
        sound = getattr(attend, name)

        def faulty(module, call, p, sound=sound):
            done = sound(module, call, p)
            return done._replace(out=done.out * 1.01)

        monkeypatch.setattr(paths, name, faulty)
    monkeypatch.setattr(engage_module, "prove_engaged", lambda before: None)
    result = _run("--model", folder, "--batch", texts, "--new-tokens", 2)
    assert result.exit_code == 1
    text = _one_line(result.stdout)
    assert "FAIL" in text and "The patched model is NOT the same model" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--path", "fast"], "--path must be one of patch, sdpa, flash or all, got 'fast'"),
        (["--device", "sofa"], "--device must name a device torch knows, got 'sofa'"),
        (["--batch", "no-such-file"], "No such file or directory: 'no-such-file'"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_usage_exits_2_in_one_sentence(arguments: list[str], message: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in _one_line(result.stderr)
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_gpu_exits_2() -> None:
    result = _run("--device", "cuda")
    assert result.exit_code == 2
    assert "got cuda and torch sees no CUDA device" in _one_line(result.stderr)


def test_damaged_model_exits_2(folder: Path, texts: Path) -> None:
    edit_json(folder / "config.json", model_type="gpt2")
    result = _run("--model", folder, "--batch", texts)
    assert result.exit_code == 2
    assert re.search(r"gpt2", _one_line(result.stderr))


def test_empty_batch_exits_2(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    result = _run("--model", folder, "--batch", tmp_path / "empty.txt")
    assert result.exit_code == 2
    assert "--batch must hold at least one text, one a line" in _one_line(result.stderr)


def test_no_arguments_show_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "verify" in result.output


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "padless", "--help"], capture_output=True, text=True, check=True
    )
    assert "verify" in done.stdout and "doctor" in done.stdout
