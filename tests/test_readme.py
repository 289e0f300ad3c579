"""The code in README.md and docs/several-gpus.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = {"README.md": 3, "docs/several-gpus.md": 2}
BLOCKS = {
    name: re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[1] / name).read_text(encoding="utf-8"), re.S
    )
    for name in PAGES
}


@pytest.mark.parametrize("page", PAGES)
def test_page_has_code(page: str) -> None:
    assert len(BLOCKS[page]) >= PAGES[page]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{page}-{number}")
        for page, blocks in BLOCKS.items()
        for number, block in enumerate(blocks)
    ],
)
def test_code_runs(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
