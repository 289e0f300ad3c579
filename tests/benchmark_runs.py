"""Runs of the benchmark scripts in seconds, and a clock that only moves by hand."""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from pathlib import Path

import pytest

from padless.benchmark.clock import Clock


@functools.cache
def smoke_record(script: str) -> str:
    """Runs a script once, whatever asks for its record; returns the file's text."""
    arguments = ["--smoke", "--device", "cpu", "--commit", "c0ffee"]
    if script not in ("syncs", "losscurve"):
        arguments += ["--seconds", "0.2"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments, "--out", folder])
        importlib.import_module(f"benchmarks.{script}").main()
        (path,) = Path(folder).glob(f"{script}-*.json")
        text = path.read_text(encoding="utf-8")
        assert folder not in text
    return text


class HandClock(Clock):
    """A clock that stands still unless somebody moves it on."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start
