"""The benchmark of `generate` runs anywhere, and says of each row what it measured or why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import generation, names


def test_script_writes_record_in_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--smoke", "--device", "cpu", "--commit", "c0ffee", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["generation", *options, "--out", str(tmp_path)])
    generation.main()
    (path,) = tmp_path.glob("generation-*.json")
    (table,) = json.loads(path.read_text(encoding="utf-8"))["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    for name in (names.PADLESS, names.SDPA):
        assert rows[name]["reason"] is None
        assert {"prefill_ms", "step_ms", "token_ms"} <= set(rows[name])
    assert "needs CUDA" in rows[f"{names.PADLESS}, backend fa4"]["reason"]
