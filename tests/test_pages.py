"""The code in README.md and on every page of docs/ runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]


def python_blocks(page: str) -> list[str]:
    """Returns the code of each fenced block that is marked as Python's."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.S | re.M)


def _cases() -> list[object]:
    return [
        pytest.param(block, id=f"{page.relative_to(CHECKOUT)}-{number}")
        for page in PAGES
        for number, block in enumerate(python_blocks(page.read_text(encoding="utf-8")))
    ]


def test_blocks_are_found() -> None:
    page = "text\n```python\na\n\nb\n```\n\n```text\nc\n```\n```python title='d'\ne\n```\n"
    assert python_blocks(page) == ["a\n\nb\n", "e\n"]


@pytest.mark.parametrize("name", ["README.md", "docs/packed-data.md", "docs/training.md"])
def test_page_has_code(name: str) -> None:
    assert len(python_blocks((CHECKOUT / name).read_text(encoding="utf-8"))) >= 3


@pytest.mark.parametrize("block", _cases())
def test_code_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block],
        # Pages may write files, and find padless where this test found it.
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
