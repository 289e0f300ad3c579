"""Marks, seeds and the per-case report that the version matrix reads.

Every transformers version of the matrix loads this file, so it imports none.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

_OUTCOMES = ("passed", "failed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--case-report", metavar="FILE", help="write what each matrix case did, as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--case-report")
    # An xdist worker sends its reports to the controller, which alone sees them all.
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(CaseReport(Path(path)), "case-report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("case")
        if mark:
            # Properties travel with the report, also from an xdist worker; marks do not.
            item.user_properties.append(("case", mark.args[0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Asked here and not at import: collecting must not touch a GPU.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for mark in item.iter_markers("requires"):
        for module in mark.args:
            try:
                importlib.import_module(module)
            except ImportError as error:
                pytest.skip(f"needs {module}: {error}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    # TF32 keeps 10 bits of mantissa: errors of that size would drown what the tests measure.
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


class CaseReport:
    """Counts the outcome of every test, in all and by the case it is marked with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.total = dict.fromkeys(_OUTCOMES, 0)
        self.cases: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test counts once: by its call, or by the set-up or tear-down that went wrong.
        if report.when != "call" and report.passed:
            return
        self.total[report.outcome] += 1
        for case in _cases(report.user_properties):
            new = {**dict.fromkeys(_OUTCOMES, 0), "reasons": []}
            counts = self.cases.setdefault(case, new)
            counts[report.outcome] += 1
            if report.skipped and (reason := _reason(report)) not in counts["reasons"]:
                counts["reasons"].append(reason)

    def pytest_sessionfinish(self) -> None:
        report = {
            "transformers": version("transformers"),
            "cases": self.cases,
            "total": self.total,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _cases(properties: list[tuple[str, object]]) -> list[str]:
    return [str(value) for name, value in properties if name == "case"]


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected failure: {report.wasxfail}"
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and no verdict in memory before and after it."""
    from padless.qualification import forget_verdicts

    monkeypatch.setenv("PADLESS_CACHE", str(tmp_path))
    monkeypatch.delenv("PADLESS_REQUALIFY", raising=False)
    forget_verdicts()
    yield tmp_path
    forget_verdicts()
