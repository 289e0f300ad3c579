"""docs/performance.md and its plots say what the records say, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import names, render
from benchmarks.markdown import number, turns
from benchmarks.results_folder import load
from benchmarks.tables import sections
from benchmarks.targets import judge

from benchmark_records import (
    all_records,
    cpu_step_record,
    generation_record,
    layer_record,
    lengths_record,
    losscurve_record,
    sequence_parallel_record,
    step_record,
    syncs_record,
)

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with every record, and a page with every marker."""
    (tmp_path / "results").mkdir()
    for made in all_records():
        path = tmp_path / "results" / f"{made['name']}-z.json"
        path.write_text(json.dumps(made), encoding="utf-8")
    (tmp_path / "performance.md").write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def _render(folder: Path, *options: str) -> int:
    results, page = str(folder / "results"), str(folder / "performance.md")
    return render.main(["--results", results, "--page", page, *options])


def test_committed_page_is_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_page_shows_the_numbers_of_the_records(folder: Path) -> None:
    page = render.fill(PAGE.read_text(encoding="utf-8"), load(folder / "results"))

    assert "| **padless** | 134 | 133 to 135 | 1.56 | 1.00 | 14.6 |" in page
    assert "| transformers sdpa (default) | 314 |" in page
    assert "No module named 'liger_kernel'" in page
    assert "| transformers sdpa (default) | 912 | 907 to 923 | 300 |" in page
    assert "**NVIDIA Z999**; driver 1.2.3, CUDA 13.0; torch 2.11.0" in page
    assert "ceilings 790 TFLOP/s (bfloat16 product), 3.00 TB/s (copy)" in page
    assert "67.6 TFLOP take 85.6 ms at the ceiling; turns a row: 3*" in page
    assert "![A training step, NVIDIA Z999](img/step-nvidia-z999.png)" in page
    assert "| 131,072 | 3 | 131 | 129 | 1.02 | 32.0 |" in page
    assert "| 32/8, 512 | 501 / 401 | 501 / 401 | - |" in page
    assert "not / here" in page, "a pipe in a reason ends a table's cell"
    assert "2026-01-02, commit abcdef123456. `python -m benchmarks.step`" in page


def test_page_shows_generation(folder: Path) -> None:
    page = render.fill(PAGE.read_text(encoding="utf-8"), load(folder / "results"))

    ours = "| **padless** | 61.0 | 1.00 | 2.44 | 2.43 to 2.47 | 1.82 | 1.00 | 88 % | 1.5 |"
    assert ours in page
    assert (
        "| transformers sdpa (default) | 122 | 2.00 | 55.1 | 54.8 to 55.8 | 41.1 | 22.6 |" in page
    )
    assert "| transformers continuous batching | RuntimeError: its thread ended |" in page
    assert "64 tokens behind the first; reading the weights takes 1.34 ms" in page
    assert "keys and values of all 0.25 GiB, with padding 0.50 GiB" in page
    left = "64 forwards of the first turn left to transformers: a call behind a cache"
    assert page.count(left) == 1
    assert f"- padless, torch alone: {left}" in page


def test_page_shows_balance_and_scaling(folder: Path) -> None:
    page = render.fill(PAGE.read_text(encoding="utf-8"), load(folder / "results"))

    assert "| **padless BalancedBatchSampler** | 9 | 1.010 | 2.020 | 0.25 |" in page
    assert "| transformers BatchRebalanceSampler | not in this transformers |" in page
    assert "| **padless BalancedBatchSampler** | 2 | 10.5 | 9700 | 0.970 |" in page
    assert "| **padless BalancedBatchSampler, one rank** | 1 | 10.5 | 5000 |  |" in page
    assert "| at most 1.05 | 1.010 | met |" in page
    assert "| at least 0.95 | 0.970 | met |" in page


def test_page_says_how_many_turns_rows_had(folder: Path) -> None:
    path = folder / "results" / "step-z.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["tables"][0]["rows"][1]["forward_backward_ms"]["count"] = 2
    path.write_text(json.dumps(record), encoding="utf-8")
    page = render.fill(PAGE.read_text(encoding="utf-8"), load(folder / "results"))

    assert "at the ceiling; turns a row: 2 to 3*" in page
    assert turns([{"name": "padless", "reason": "out of memory"}]) == ""


def test_page_changes_with_a_number(folder: Path) -> None:
    records = load(folder / "results")
    before = sections(records)
    for record in records:
        if record["name"] == "step":
            record["tables"][0]["rows"][1]["forward_backward_ms"]["median"] = 321.0
    after = sections(records)

    assert "| 321 |" in after["step"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"step", "targets"}


@pytest.mark.requires("matplotlib")
def test_render_writes_page_and_plots(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _render(folder, "--check") == 1
    assert "performance.md is not what the records say" in capsys.readouterr().err
    assert _render(folder) == 0
    assert _render(folder, "--check") == 0

    page = (folder / "performance.md").read_text(encoding="utf-8")
    plots = sorted(path.name for path in (folder / "img").iterdir())
    assert len(plots) == 9
    plots.remove("headline.png")
    for plot in plots:
        assert f"(img/{plot})" in page
        assert (folder / "img" / plot).read_bytes().startswith(b"\x89PNG")
    (folder / "performance.md").write_text(page.replace("| 134 |", "| 99 |"), encoding="utf-8")
    assert _render(folder, "--check") == 1


@pytest.mark.requires("matplotlib")
def test_plots_show_every_row_that_has_numbers(tmp_path: Path) -> None:
    from benchmarks import plots

    figure = plots._step(step_record())
    shown = [text.get_text() for axis in figure.axes for text in axis.get_yticklabels()]
    rows = [row for table in step_record()["tables"] for row in table["rows"]]
    assert sorted(shown) == sorted(row["name"] for row in rows if row["reason"] is None)
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert " 134 ms, 1.56 x floor" in labels
    assert " 912 ms, 300 ms when met again" in labels
    assert "floor 86 ms" in labels


@pytest.mark.requires("matplotlib")
def test_headline_shows_the_times_of_the_record() -> None:
    from benchmarks.plot_headline import headline

    labels = {text.get_text() for axis in headline(step_record()).axes for text in axis.texts}
    tables = step_record()["tables"]
    times = {
        row["name"]: row["forward_backward_ms"] for row in tables[0]["rows"] if not row["reason"]
    }
    for name in ("transformers sdpa (default)", "padless"):
        assert f" {times[name]['median']:.0f} ms" in labels


@pytest.mark.requires("matplotlib")
def test_plot_of_generation_shows_every_row_that_has_numbers() -> None:
    from benchmarks.plots_generation import plot_generation

    made = generation_record()
    made["tables"][1]["rows"][0]["prefill_ms"]["median"] = 1028.6
    figure = plot_generation(made)
    shown = [text.get_text() for axis in figure.axes for text in axis.get_yticklabels()]
    rows = [row for table in generation_record()["tables"] for row in table["rows"]]
    assert sorted(shown) == sorted(row["name"] for row in rows if row["reason"] is None)
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert " 2.44 ms, 1.82 x floor; first token 61.0 ms" in labels
    assert " 12.0 ms, 8.96 x floor; first token 1029 ms" in labels


def test_shared_sequences_have_a_table_and_a_verdict() -> None:
    from benchmarks.tables_parallel import write_sequence_parallel
    from benchmarks.targets import judge

    record = sequence_parallel_record()
    page = write_sequence_parallel(record)
    assert "| **padless, Ulysses** | 26.0 | 0.960 |  | 1.0 | 3.0e-03 |" in page
    assert "| **padless, ring** | 27.0 | 0.930 | 83% | 1.0 | 3.0e-03 |" in page
    assert "| torch context_parallel | cannot resize variables |" in page
    assert [(v.key, v.is_met) for v in judge([record])] == [("P13", True)]
    # The better of the two counts, and no length but the two.
    record["tables"][0]["rows"].pop(1)
    assert [v.is_met for v in judge([record])] == [False]
    record["tables"][0]["tokens_real"] = 65536
    assert judge([record]) == []


def test_timelines_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    from benchmarks.plot_names import file_name
    from benchmarks.plots import draw

    record = sequence_parallel_record()
    (path,) = draw([record], tmp_path)
    assert path.name == file_name(record) == "sequence_parallel-nvidia-z999.png"
    assert path.stat().st_size > 10_000
    for row in record["tables"][0]["rows"]:
        row.pop("timeline", None)
    assert file_name(record) is None and draw([record], tmp_path) == []


def test_page_without_records_names_the_commands(tmp_path: Path) -> None:
    page = render.fill(PAGE.read_text(encoding="utf-8"), load(tmp_path))
    assert "Not measured yet: `python -m benchmarks.layer`." in page
    assert "Nothing measured yet." in page


def test_smoke_runs_do_not_count(folder: Path) -> None:
    path = folder / "results" / "step-z.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "smoke": True}), encoding="utf-8")

    assert "step" not in {record["name"] for record in load(folder / "results")}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("begin: layer", "begin: other", "missing: layer"),
        ("<!-- begin: step -->", "<!-- begin: step -->\n<!-- end: step -->\n<!-- begin: step -->",
         "missing: none"),
    ],
    ids=["missing", "twice"],
)  # fmt: skip
def test_wrong_markers_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    page = folder / "performance.md"
    page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert _render(folder, "--check") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0012, "1.2e-03"), (0.123, "0.12"), (3.14159, "3.14"), (42.42, "42.4"),
     (314.2, "314")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def _met(record: dict[str, Any], key: str, part: str = "") -> list[bool | None]:
    return [v.is_met for v in judge([record]) if v.key == key and part in v.measure]


def test_targets_are_judged_by_the_records() -> None:
    assert _met(step_record(), "P3") == [True]
    assert _met(step_record(), "P4") == [False, False]
    assert _met(step_record(), "P5") == [True, False]
    assert _met(step_record(), "P6") == [True]
    assert _met(step_record(), "P12") == [True, False, True]
    assert _met(layer_record(), "P1") == [True] * 4
    assert _met(layer_record(), "P2") == [True, True]
    assert _met(lengths_record(), "P9") == [True] * 4
    assert _met(syncs_record(), "P8") == [True, True, False]
    assert _met(cpu_step_record(), "P10") == [True]
    assert _met(losscurve_record(), "curve") == [True, True]


def _with_ms(record: dict[str, Any], at: int, name: str, ms: float) -> dict[str, Any]:
    made = copy.deepcopy(record)
    for row in made["tables"][at]["rows"]:
        if row["name"] == name:
            row["forward_backward_ms"]["median"] = ms
    return made


def test_targets_turn_with_the_numbers() -> None:
    slow = _with_ms(step_record(), 0, names.PADLESS, 141.0)
    assert _met(slow, "P3") == [False]
    slow = _with_ms(layer_record(), 0, names.PADLESS, 5.9)
    assert _met(slow, "P1") == [False, True, True, True]
    assert _met(slow, "P2") == [False, True]
    slow = _with_ms(lengths_record(), 2, names.PADLESS, 40.0)
    assert _met(slow, "P9") == [False, True, True, True]
    slow = _with_ms(cpu_step_record(), 0, names.PADLESS, 2000.0)
    assert _met(slow, "P10") == [False]
    steep = lengths_record()
    steep["tables"][3]["rows"][1]["peak_bytes"] *= 2
    assert _met(steep, "P9") == [True, False, True, True]
    apart = losscurve_record()
    apart["tables"][0]["difference"]["runs"]["largest"] = 2e-4
    apart["tables"][1]["difference"]["same_weights"]["mean"] = 1e-6
    assert _met(apart, "curve") == [False, False]


def test_targets_of_generation_are_judged_by_the_record() -> None:
    made = generation_record()
    assert _met(made, "P7", "over the floor; new lengths") == [True]
    assert _met(made, "P7", "record to go for; new lengths") == [True]
    assert _met(made, "P7", "over the floor; one shape") == [True]
    assert _met(made, "P7", "record to go for; one shape") == [False]
    assert _met(made, "P7", "first token over the best peer's; new lengths") == [True]
    # 96 ms, and 95 of the compiled peer.
    assert _met(made, "P7", "first token over the best peer's; one shape") == [False]
    assert _met(made, "P7", f"{names.SDPA_NO_CUDNN} over ours") == [True]
    assert _met(made, "P7", f"{names.SDPA} over ours") == [True]
    # The largest is of one shape, 96 ms over 95; the last batch has none of ours.
    assert _met(made, "P7", "first token over the best peer's; largest of all") == [False]
    assert _met(made, "P7", "a decoded token over the best peer's; largest of all") == [True]
    assert len(_met(made, "P7")) == 10, "other batches have no targets of their own"


@pytest.mark.parametrize(
    ("name", "measure", "ms", "part"),
    [
        (names.PADLESS, "decode_ms", 2.6, "record to go for; new lengths"),
        (names.PADLESS, "decode_ms", 3.0, "over the floor; new lengths"),
        (names.PADLESS, "prefill_ms", 101.1, "first token over the best peer's; new lengths"),
        (names.SDPA_NO_CUDNN, "decode_ms", 8.5, f"{names.SDPA_NO_CUDNN} over ours"),
        (names.SDPA, "decode_ms", 43.0, f"{names.SDPA} over ours"),
    ],
)
def test_targets_of_generation_turn_with_the_numbers(
    name: str, measure: str, ms: float, part: str
) -> None:
    made = generation_record()
    (row,) = (row for row in made["tables"][0]["rows"] if row["name"] == name)
    row[measure]["median"] = ms
    assert _met(made, "P7", part) == [False]
    row["reason"] = "ImportError"
    assert _met(made, "P7", part) == [None]


def test_every_batch_of_generation_counts_against_its_best_peer() -> None:
    made = generation_record()
    for row in made["tables"][1]["rows"]:
        if row["name"] == names.SDPA_STATIC_COMPILED:
            row["decode_ms"]["median"], row["prefill_ms"]["median"] = 2.7, 97.0
    assert _met(made, "P7", "a decoded token over the best peer's; largest of all") == [False]
    assert _met(made, "P7", "first token over the best peer's; largest of all") == [True]
    for table in made["tables"]:
        table["rows"] = [row for row in table["rows"] if "padless" not in row["name"]]
    assert _met(made, "P7", "largest of all") == [None, None]


def test_target_without_numbers_is_not_measured() -> None:
    record = step_record()
    for row in record["tables"][0]["rows"]:
        if row["name"] == names.FA4_BY_HAND:
            row["reason"] = "ImportError"
    assert _met(record, "P3") == [None]
    assert "not measured" in sections([record])["targets"]
