"""Records of one script in parts: joined, with each table's origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.join import JoinError, join, main
from benchmarks.markdown import title


def _record(commit: str, *cases: str, **other: Any) -> dict[str, Any]:
    record = {
        "format": 1, "name": "generation", "smoke": False, "versions": {"torch": "2.11"},
        "hardware": {"device": "A GPU", "driver": commit}, "command": f"run {commit}",
        "date": "2026-01-01", "commit": commit, "ceilings": {"copy_tb_s": 3.0},
        "tables": [{"case": case, "ms": commit, "rows": []} for case in cases],
    }  # fmt: skip
    return {**record, **other}


def _found(record: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    return [
        (table["case"], table["ms"], table.get("measured", {}).get("commit"))
        for table in record["tables"]
    ]


def test_of_each_case_the_newest_table_stays() -> None:
    joined = join([_record("a", "one", "two"), _record("b", "two", "three")])
    assert joined["commit"] == "b" and joined["command"] == "run b"
    assert _found(joined) == [("one", "a", "a"), ("two", "b", None), ("three", "b", None)]
    assert joined["tables"][0]["measured"]["command"] == "run a"
    # And once more: what was older keeps its own origin.
    again = join([joined, _record("c", "three")])
    assert _found(again) == [("one", "a", "a"), ("two", "b", "b"), ("three", "c", None)]


def test_a_table_says_that_it_is_of_another_run() -> None:
    one, two = join([_record("a", "one"), _record("b", "two")])["tables"]
    assert title(one) == "one; measured apart, commit a"
    assert title(two) == "two"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "step"}, "the same name"),
        ({"versions": {"torch": "2.12"}}, "the same versions"),
        ({"smoke": True}, "the same smoke"),
        ({"hardware": {"device": "Another"}}, "of the same device"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    other: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [_record("a", "one", **other), _record("b", "two")]
    with pytest.raises(JoinError, match=message):
        join(records)
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps(record), encoding="utf-8")
    assert main([*map(str, paths), "--out", str(paths[1])]) == 2
    assert message in capsys.readouterr().err
    assert json.loads(paths[1].read_text(encoding="utf-8")) == records[1]


def test_a_case_can_be_left_out() -> None:
    records = [_record("a", "one", "two"), _record("b", "three")]
    assert [each[0] for each in _found(join(records, without="two"))] == ["one", "three"]
    with pytest.raises(JoinError, match="must be one of one, two, three, got four"):
        join(records, without="four")


def test_a_record_may_be_written_over_one_of_its_parts(tmp_path: Path) -> None:
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, record in zip(paths, (_record("a", "one"), _record("b", "two")), strict=True):
        path.write_text(json.dumps(record), encoding="utf-8")
    assert main([*map(str, paths), "--out", str(paths[0])]) == 0
    made = json.loads(paths[0].read_text(encoding="utf-8"))
    assert [table["case"] for table in made["tables"]] == ["one", "two"]
