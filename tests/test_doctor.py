"""`doctor` on this machine, sound and with broken packages planted; in fresh processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import padless
from broken_packages import UNDEFINED, plant
from padless.diagnosis import report, run
from padless.diagnosis.report import Diagnosis
from padless.selection import BACKENDS

MODULE = "flash_attn.flash_attn_interface"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that backends are measured once."""
    return tmp_path_factory.mktemp("kept")


def _command(kept: Path, *arguments: str, site: Path | None = None) -> Any:
    """Runs the command with a folder in front of the path."""
    path = [str(site)] if site else []
    path += [entry for entry in sys.path if entry]
    start = "from padless.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", start, "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PADLESS_CACHE": str(kept)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _started(kept: Path, *arguments: str, site: Path) -> Any:
    path = [str(site), *(entry for entry in sys.path if entry)]
    return subprocess.Popen(
        [sys.executable, "-c", "from padless.cli import main; main()", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PADLESS_CACHE": str(kept)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell tests ignore SIGINT, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_this_machine(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADLESS_CACHE", str(kept))
    monkeypatch.setenv("HF_TOKEN", "secret")
    told: list[tuple[str, int, int]] = []
    found = padless.doctor(seconds=math.inf, on_progress=lambda *said: told.append(said))
    assert found.ok
    assert [backend.name for backend in found.backends] == list(BACKENDS)
    assert found.transformers.state == "ok"
    assert found.transformers.support == "tested"
    assert found.torch.fault is None
    assert found.variables["PADLESS_CACHE"] == found.cache == str(kept)
    assert "HF_TOKEN" not in found.variables
    assert len(found.choices) == 18
    assert all(choice.backend for choice in found.choices)
    assert not any(backend.unmeasured for backend in found.backends)
    assert told[0] == ("importing torch and transformers", 0, 0)
    assert told[-1][2] == len(BACKENDS) * len(found.choices)
    assert (found.is_interrupted, found.device == "cpu") == (False, found.usual_dtype == "float32")
    assert found.next_step
    data = found.as_dict()
    assert json.loads(json.dumps(data)) == data
    # Stable names: those that the docstring of the report documents.
    assert list(data) == ["ok", *(field.name for field in fields(Diagnosis))]


def test_every_field_of_the_report_is_documented() -> None:
    kinds = [kind for kind in vars(report).values() if hasattr(kind, "__dataclass_fields__")]
    assert len(kinds) == 7
    for kind in kinds:
        for field in fields(kind):
            assert f"        {field.name}: " in (kind.__doc__ or ""), (kind, field.name)


@pytest.mark.parametrize("limit_s", [0, -1.0, float("nan")])
def test_a_limit_must_be_positive(limit_s: float) -> None:
    with pytest.raises(ValueError, match="limit_s must be a positive number of seconds, got"):
        padless.doctor(limit_s=limit_s)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("oserror", f"import {MODULE} failed: OSError: {UNDEFINED}"),
        ("aborts", f"import {MODULE}: the process died of SIGABRT: terminate called"),
        ("segfaults", f"import {MODULE}: the process died of SIGSEGV"),
        ("hangs", f"import {MODULE}: no answer within 3 s"),
    ],
)
def test_a_broken_package_is_told(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, kind)
    monkeypatch.syspath_prepend(tmp_path)
    package = run._ask_package("flash-attn", MODULE, 3)
    assert (package.name, package.version, package.state) == ("flash-attn", "2.8.3", "broken")
    assert package.fault.startswith(said)


def test_a_sound_package_and_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "prints")
    monkeypatch.syspath_prepend(tmp_path)
    assert run._ask_package("flash-attn", MODULE, 60).state == "ok"
    # The folder is FlashAttention-2's, without FlashAttention-4 in it.
    four = run._ask_package("flash-attn-4", "flash_attn.cute.interface", 60)
    assert (four.state, four.version, four.fault) == ("missing", None, "")
    assert run._ask_package("flash-attn-3", "flash_attn_interface", 60).state == "missing"


@pytest.mark.parametrize("kind", ["oserror", "aborts"])
def test_what_shares_a_broken_folder_and_is_not_there_is_missing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, kind)
    monkeypatch.syspath_prepend(tmp_path)
    four = run._ask_package("flash-attn-4", "flash_attn.cute.interface", 60)
    assert (four.state, four.fault) == ("missing", "")


def test_a_part_of_another_package_without_what_it_needs_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "prints")
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("import cutlass_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    four = run._ask_package("flash-attn-4", "flash_attn.cute.interface", 60)
    assert four.state == "missing"
    assert "No module named 'cutlass_not_here'" in four.fault


def test_a_package_that_lacks_what_it_needs_is_broken_and_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, "prints")
    (tmp_path / "flash_attn" / "__init__.py").write_text("import einops_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    assert run._ask_package("flash-attn", MODULE, 60).state == "broken"


@pytest.mark.parametrize(
    "version, support, era",
    [
        ("4.27.4", "too old", None),
        ("4.28.1", "tested", "A"),
        ("5.23.4", "tested", "Q"),
        ("5.24.0.dev0", "newer", "Q"),
        ("6.0", "newer", "Q"),
    ],
)
def test_support_of_transformers(
    version: str, support: str, era: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "package_version", lambda name: Version(version))
    found = run._with_era(report.Package("transformers", version, "ok"))
    assert (found.support, found.era) == (support, era)


def test_packages_that_end_their_process_leave_a_report(kept: Path, tmp_path: Path) -> None:
    plant(tmp_path, "aborts")
    plant(tmp_path, "oserror", "transformers")
    done = _command(kept, "--json", site=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["transformers"]["state"] == "broken"
    assert UNDEFINED in found["transformers"]["fault"]
    assert found["transformers"]["support"] == "too old"
    by_name = {backend["name"]: backend for backend in found["backends"]}
    assert by_name["fa2"]["status"] == by_name["fa1"]["status"] == "broken"
    assert "died of SIGABRT: terminate called" in by_name["fa2"]["reasons"][0]
    assert by_name["sdpa"]["status"] == "accepted"
    assert found["next_step"].startswith("upgrade transformers 2.8.3")


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_seconds_must_not_be_negative(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be 0 or more, or None, got"):
        padless.doctor(seconds=seconds)


def test_no_backend_that_can_be_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_backends(*args: Any, **options: Any) -> Any:
        raise run.NoAnswerError("ImportError: x")

    monkeypatch.setattr(run, "ask_backends", ask_backends)
    found = padless.doctor()
    assert (found.backends, found.choices, found.backends_fault) == ((), (), "ImportError: x")


def test_what_is_not_measured_is_neither_accepted_nor_rejected(tmp_path: Path) -> None:
    done = _command(tmp_path / "empty", "--json", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    by_name = {backend["name"]: backend for backend in found["backends"]}
    assert by_name["sdpa"]["status"] == "unmeasured"
    assert by_name["sdpa"]["unmeasured"] == len(found["choices"])
    assert by_name["reference"]["status"] == "accepted"
    assert all(choice["backend"] is None for choice in found["choices"])
    assert all("sdpa" in choice["unmeasured"] for choice in found["choices"])
    assert found["next_step"].startswith("run `padless doctor --all`, which measures")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_while_packages_are_imported_ends_it_at_once(
    number: signal.Signals, kept: Path, tmp_path: Path
) -> None:
    plant(tmp_path, "hangs")
    start = time.monotonic()
    with _started(kept, site=tmp_path) as child:
        # Its line says that it has been at it for a second.
        assert child.stderr.readline().startswith("padless doctor: importing packages")
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert out == ""
    assert "padless doctor: interrupted before anything was found" in err
    assert "Traceback" not in err
    assert time.monotonic() - start < 30


def test_a_broken_torch_leaves_a_report_and_exits_1(kept: Path, tmp_path: Path) -> None:
    plant(tmp_path, "oserror", "torch")
    done = _command(kept, site=tmp_path)
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert "Nothing can run here." in text
    assert "undefined symbol" in text
    assert "torch does not import" in text
    assert "Next: reinstall torch, which does not import" in text
    assert "Traceback" not in done.stdout + done.stderr


def test_a_gpu_question_that_ends_its_process_keeps_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(question: str, *, limit_s: float) -> Any:
        yield {"torch": {"version": "2.11.0", "cuda": "13.0", "hip": None}}
        yield {"cuda_fault": None}
        raise run.NoAnswerError("the process died of SIGSEGV")

    monkeypatch.setattr(run, "ask", ask)
    torch, gpus = run._ask_torch(1.0)
    assert (torch.version, torch.fault, gpus) == ("2.11.0", None, ())
    assert torch.cuda_fault == "while asking for its GPUs: the process died of SIGSEGV"
