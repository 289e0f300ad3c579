"""The benchmark of shared sequences runs anywhere, and checks what it times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.sequence_peers")


def test_benchmark_writes_its_record(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "benchmarks.sequence_parallel", "--smoke", "--device", "cpu", "--trace"),
        *("--seconds", "0.2", "--commit", "c0ffee", "--out", str(tmp_path)),
    ]
    path = os.pathsep.join([str(root), *(each for each in sys.path if each)])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # torch keeps the mesh, and with it the group, until the interpreter ends; Gloo's thread aborts
    # the rank if it still wants the interpreter's lock then (one run of fifty). The record is
    # complete by that time, or the checks below say so.
    assert done.returncode == 0 or "exitcode: -6" in done.stderr, done.stderr[-2000:]
    (file,) = tmp_path.glob("sequence_parallel-*.json")
    record = json.loads(file.read_text())
    assert [table["kind"] for table in record["tables"]] == [
        "one sequence",
        "packed documents",
    ] * 2
    for table in record["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert table["ranks"] == 2 and rows["one GPU"]["reason"] is None
        for name in ("padless, Ulysses", "padless, ring", "Ulysses by hand, nothing overlapped"):
            assert rows[name]["reason"] is None
            assert max(rows[name]["relative_rms"].values()) < 1e-5
            alone, shared = (rows[n]["forward_backward_ms"]["median"] for n in ("one GPU", name))
            assert rows[name]["efficiency"] == pytest.approx(alone / 2 / shared)
