"""The benchmark of data parallel training runs by torchrun, and counts as it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import names

ROOT = Path(__file__).parents[2]


def test_script_writes_record_in_smoke(tmp_path: Path) -> None:
    command = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d"
    command += " --rdzv-endpoint 127.0.0.1:0 -m benchmarks.data_parallel --smoke --device cpu"
    path = [str(ROOT), *(entry for entry in sys.path if entry)]
    done = subprocess.run(
        [sys.executable, *command.split(), "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("data_parallel-*.json")
    (table,) = json.loads(file.read_text())["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert table["backend"] == "gloo"
    assert len(rows) == 4
    for name in (names.SHUFFLED, names.BALANCED):
        alone, both = rows[names.on_one_rank(name)], rows[name]
        expected = both["tokens_a_second"] / (2 * alone["tokens_a_second"])
        assert both["efficiency"] == pytest.approx(expected)
        assert both["forward_backward_ms"]["count"] == 2
