"""Runs a file of tests in Triton's interpreter, for which Triton has to be told before it loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def passed_in_the_interpreter(name: str) -> int:
    """Counts the tests of a file beside this one that pass; all have to, and none may be skipped.

    An empty file does not pass.
    """
    file = Path(__file__).with_name(name)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"],
        env={**environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    passed = re.fullmatch(r"(\d+) passed(?:, \d+ warnings?)? in .*", summary)
    assert passed, summary
    return int(passed[1])
