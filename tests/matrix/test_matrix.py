"""The matrix runner: which rows it picks, when it rebuilds, what counts as failed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from matrix import overlays, table
from matrix.overlays import Era, MatrixError, load_eras, select_eras
from matrix.table import Grid, Result

OLD = Era("A", "4.28.1", ("tokenizers==0.13.3",), python="<3.12")
NEW = Era("Q", "5.23.0", (), peft="0.21.2")


def _result(era: Era, problem: str = "", **cases: tuple[int, int, int, list[str]]) -> Result:
    names = ("passed", "failed", "skipped", "reasons")
    counts = {case: dict(zip(names, row, strict=True)) for case, row in cases.items()}
    total = {name: sum(row[name] for row in counts.values()) for name in names[:3]}
    return Result(era, report={"cases": counts, "total": total}, problem=problem)


def test_pins_have_one_row_per_version_oldest_first():
    versions = [era.transformers for era in load_eras()]
    assert len(versions) == len(set(versions)) == 18
    assert versions == sorted(versions, key=lambda text: [int(part) for part in text.split(".")])
    assert (versions[0], versions[-1]) == ("4.28.1", "5.23.0")


def test_newest_row_is_the_version_of_the_constraints():
    constraints = (overlays.CHECKOUT / "constraints.txt").read_text("utf-8").splitlines()
    assert set(load_eras()[-1].requirements) <= set(constraints)


@pytest.mark.parametrize(
    ("wanted", "python", "versions"),
    [
        ("all", "3.11.7", ["4.28.1", "5.23.0"]),
        ("newest,oldest", "3.11.7", ["4.28.1", "5.23.0"]),
        ("oldest", "3.12.1", ["5.23.0"]),
        ("A", "3.11.7", ["4.28.1"]),
        ("5.23.0, Q", "3.11.7", ["5.23.0"]),
    ],
)
def test_select_picks_rows_in_matrix_order(wanted, python, versions):
    assert [era.transformers for era in select_eras([OLD, NEW], wanted, python)] == versions


@pytest.mark.parametrize(("wanted", "text"), [("4.1", "no version '4.1'"), (" ,", "no versions")])
def test_select_refuses_unknown_or_no_versions(wanted, text):
    with pytest.raises(MatrixError, match=text):
        select_eras([OLD, NEW], wanted)


@pytest.fixture
def pip(monkeypatch):
    """A pip that installs one empty file, or fails; it records the requirements it got."""
    calls = []

    def run(command, **_):
        target = Path(command[command.index("--target") + 1])
        calls.append(command[command.index(str(target)) + 1 :])
        target.mkdir()
        (target / "module.py").touch()
        return subprocess.CompletedProcess(command, run.returncode, "", "no such wheel")

    run.returncode = 0
    run.calls = calls
    monkeypatch.setattr(overlays.subprocess, "run", run)
    return run


def test_overlay_is_built_once_and_again_when_its_pins_change(pip, tmp_path):
    overlay = overlays.build_overlay(OLD, tmp_path)
    assert overlays.build_overlay(OLD, tmp_path) == overlay
    assert pip.calls == [["transformers==4.28.1", "tokenizers==0.13.3"]]
    changed = Era("A", "4.28.1", ("tokenizers==0.13.2",))
    assert overlays.build_overlay(changed, tmp_path) == overlay
    assert len(pip.calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["4.28.1"]


def test_failed_build_leaves_nothing_and_says_what_pip_said(pip, tmp_path):
    pip.returncode = 1
    with pytest.raises(MatrixError, match=r"(?s)transformers==4\.28\.1.*no such wheel"):
        overlays.build_overlay(OLD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_overlay_without_stamp_is_not_taken_for_a_whole_one(pip, tmp_path):
    (tmp_path / OLD.transformers).mkdir()
    overlay = overlays.build_overlay(OLD, tmp_path)
    assert (overlay / "module.py").exists()


def test_grid_shows_outcomes_and_notes_why_tests_were_skipped():
    grid = Grid(
        [
            _result(OLD, logits=(3, 1, 0, []), lora=(0, 0, 2, ["no peft"]), gpu=(0, 0, 1, ["x"])),
            _result(NEW, logits=(4, 0, 1, ["x"]), lora=(2, 0, 0, [])),
            Result(Era("B", "4.31.0", ()), absent="no wheels for Python 3.13"),
        ]
    )
    cells = [[cell.markdown() for cell in row] for _, row in grid.rows]
    assert cells == [["**FAIL 1**", "-²", "-³"], ["ok 4¹", "ok 2", ""], ["", "", ""]]
    assert grid.footnotes() == [
        "¹ logits, skipped where x",
        "² lora, skipped where no peft",
        "³ gpu, skipped where x",
        "4.31.0 not run: no wheels for Python 3.13",
    ]
    assert grid.markdown().splitlines()[3] == "| Q | 5.23.0 | ok 4¹ | ok 2 |  |"


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (80, 3)])
def test_grid_cuts_the_table_to_the_width_and_keeps_every_case(width, tables):
    cases = {f"case_number_{index}": (index, 0, 0, []) for index in range(8)}
    console = Console(width=width, record=True, file=io.StringIO())
    parts = Grid([_result(OLD, **cases)]).rich(width)
    console.print(*parts)
    text = console.export_text()
    assert len(parts) == tables
    assert all(case in text for case in cases)
    assert max(map(len, text.splitlines())) <= width


def test_totals_count_a_version_that_crashed_as_one_failure():
    crashed = Result(OLD, problem="pytest ended with 2")
    assert table.totals([crashed, _result(NEW, logits=(4, 0, 1, ["x"]))]) == {
        "passed": 4,
        "failed": 1,
        "skipped": 1,
    }


def test_readme_keeps_what_stands_around_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n", encoding="utf-8")
    table.write_between_markers(readme, "new")
    table.write_between_markers(readme, "newer")
    assert readme.read_text("utf-8") == f"a\n{table.BEGIN}\nnewer\n{table.END}\nb\n"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(MatrixError, match=r"README\.md needs the lines"):
        table.write_between_markers(readme, "new")


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one-process", "xdist"])
def test_case_report_counts_every_outcome(workers, tmp_path):
    (tmp_path / "conftest.py").write_text(
        Path(__file__).parents[1].joinpath("conftest.py").read_text("utf-8"), encoding="utf-8"
    )
    marks = '"case(name): ", "gpu: ", "requires(*modules): "'
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\nmarkers = [{marks}]\n", encoding="utf-8"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.case('one')\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.requires('no_such_module')\n"
        "def test_needy(): pass\n"
        "@pytest.mark.case('two')\n"
        "@pytest.mark.xfail(reason='upstream')\n"
        "def test_known(): assert 0\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "--case-report", "deep/report.json", *workers]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    report = json.loads((tmp_path / "deep/report.json").read_text("utf-8"))
    reason = "needs no_such_module: No module named 'no_such_module'"
    assert report["total"] == {"passed": 1, "failed": 2, "skipped": 2}
    assert report["cases"] == {
        "one": {"passed": 1, "failed": 2, "skipped": 1, "reasons": [reason]},
        "two": {"passed": 0, "failed": 0, "skipped": 1, "reasons": ["expected failure: upstream"]},
    }
