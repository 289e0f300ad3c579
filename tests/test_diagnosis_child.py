"""Questions in a process of their own: what comes back when it raises, dies or hangs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from broken_packages import UNDEFINED, plant
from padless.diagnosis.child import NoAnswerError, ask

MODULE = "flash_attn.flash_attn_interface"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_sound_package_gives_no_reason_whatever_it_prints(site: Path) -> None:
    plant(site, "prints")
    assert list(ask("import", MODULE, limit_s=60)) == [""]


def test_what_a_loader_raises_is_the_reason(site: Path) -> None:
    plant(site, "oserror")
    assert list(ask("import", MODULE, limit_s=60)) == [
        f"import {MODULE} failed: OSError: {UNDEFINED}"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    "kind, reason",
    [
        ("aborts", "the process died of SIGABRT: terminate called after throwing c10::Error"),
        ("segfaults", "the process died of SIGSEGV"),
        ("exits", "the process exited with code 3"),
    ],
)
def test_a_death_is_told_with_its_signal_and_last_words(kind: str, reason: str, site: Path) -> None:
    plant(site, kind)
    with pytest.raises(NoAnswerError) as caught:
        list(ask("import", MODULE, limit_s=60))
    assert str(caught.value) == reason


@pytest.mark.parametrize("limit_s", [0.5, 3])
def test_a_hang_is_ended_and_told_with_its_limit(limit_s: float, site: Path) -> None:
    plant(site, "hangs")
    start = time.monotonic()
    with pytest.raises(NoAnswerError) as caught:
        list(ask("import", MODULE, limit_s=limit_s))
    assert str(caught.value) == f"no answer within {limit_s} s"
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes fork on POSIX")
def test_a_death_is_told_although_something_holds_the_pipe(site: Path) -> None:
    plant(site, "leaves_a_child")
    with pytest.raises(NoAnswerError) as caught:
        list(ask("import", MODULE, limit_s=8))
    assert str(caught.value) == "the process died of SIGABRT"
    left = int((site / "left").read_text())
    for _ in range(50):
        if not _is_running(left):
            return
        time.sleep(0.1)
    pytest.fail("what the package started is still there")


def _is_running(pid: int) -> bool:
    try:
        # A zombie is dead too: who adopts it decides when it is reaped.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_question_raises_is_told_in_one_line() -> None:
    with pytest.raises(NoAnswerError) as caught:
        list(ask("backends", {"device": "no such device", "done": []}, limit_s=60))
    assert str(caught.value).startswith("RuntimeError: ")
    assert "\n" not in str(caught.value)


def test_the_working_folder_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "padless_lies_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (reason,) = ask("import", "padless_lies_here", limit_s=60)
    assert "ModuleNotFoundError" in reason


def test_answers_come_before_the_process_ends_and_a_caller_may_leave(site: Path) -> None:
    asked = ask("torch", limit_s=60)
    assert "version" in next(asked)["torch"]
    asked.close()
