"""Plots of records, each with the hardware and the versions that it was measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from benchmarks import names
from benchmarks.plot_names import file_name
from benchmarks.plots_generation import plot_generation
from benchmarks.plots_parallel import plot_timelines
from benchmarks.results_folder import Json, median_ms
from padless.benchmark.bars import draw_bars
from padless.benchmark.plot_style import (
    LINES,
    OURS,
    PEER,
    PEER_LIGER,
    STYLE,
    new_figure,
    timed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(records: Sequence[Json], folder: Path) -> list[Path]:
    """Draws the plots of records into a folder.

    Args:
        records: as `results_folder.load` gives them.
        folder: is made if it is not there.

    Returns:
        The files.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for record in records:
        name = file_name(record)
        if name is None:
            continue
        with plt.rc_context(STYLE):
            figure = _PLOTS[record["name"]](record)
            path = folder / name
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def _step(record: Json) -> Figure:
    tables = [table for table in record["tables"] if timed(table)]
    counts = [len(timed(table)) for table in tables] or [1]
    figure, axes = new_figure(
        record,
        "A training step, forward and backward",
        len(counts),
        1,
        (9.6, sum(1.2 + 0.29 * count for count in counts)),
        height_ratios=[2 + count for count in counts],
    )
    for line, table in zip(axes, tables, strict=False):
        draw_bars(line[0], table)
    return figure


def _layer(record: Json) -> Figure:
    wanted = {
        names.ORIGINAL_FLASH: PEER,
        names.ORIGINAL_SDPA: PEER_LIGER,
        names.SDPA: "#4f6bb0",
        names.FA4_BY_HAND: "#a3b3dd",
        names.PADLESS: OURS,
        names.FLOOR: "#b45309",
        names.FLOOR_ONE_PRODUCT: "#e0a872",
    }
    tables = record["tables"]
    figure, axes = new_figure(
        record, "One attention layer, forward and backward", 1, 1, (1.5 + 2.4 * len(tables), 4.2)
    )
    axis = axes[0][0]
    present = {row["name"] for table in tables for row in table["rows"]}
    wanted = {name: color for name, color in wanted.items() if name in present}
    width = 0.8 / len(wanted)
    for index, (name, color) in enumerate(wanted.items()):
        places = [place + (index - len(wanted) / 2 + 0.5) * width for place in range(len(tables))]
        times = [median_ms(table, name) for table in tables]
        axis.bar(places, [ms or 0.0 for ms in times], width * 0.9, color=color, label=name)
        weight = "bold" if name == names.PADLESS else "normal"
        for place, ms in zip(places, times, strict=True):
            options: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7}
            if ms is None:
                axis.text(place, 0, " not to be had", rotation=90, color="#9ca3af", **options)
            else:
                axis.text(place, ms, f"{ms:.1f}", fontweight=weight, **options)
    axis.set_xticks(range(len(tables)), [table["case"] for table in tables], fontsize=8.5)
    axis.set_ylabel("milliseconds")
    axis.grid(axis="y")
    axis.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.01), borderpad=0)
    return figure


def _lengths(record: Json) -> Figure:
    kinds = ("one sequence", "packed documents")
    figure, axes = new_figure(
        record, "One attention layer from 2k to 128k tokens", 2, 2, (10.5, 6.4), sharex=True
    )
    for column, kind in enumerate(kinds):
        tables = [table for table in record["tables"] if table["kind"] == kind]
        time_axis, memory_axis = axes[0][column], axes[1][column]
        shown = (names.SDPA, names.FA4, names.FA4_BY_HAND, names.PADLESS)
        for name, color in zip(shown, ("#8b93a1", "#4f6bb0", "#4f6bb0", OURS), strict=True):
            points, memory = [], []
            for table in tables:
                floors = [median_ms(table, floor) for floor in names.FLOORS]
                floor = min((ms for ms in floors if ms is not None), default=None)
                ms = median_ms(table, name)
                if ms is not None and floor:
                    points.append((table["tokens_real"], ms / floor))
                peak = next((r.get("peak_bytes") for r in table["rows"] if r["name"] == name), None)
                if peak:
                    memory.append((table["tokens_real"], peak / 2**30))
            width = 2.4 if name == names.PADLESS else 1.5
            options = {"color": color, "marker": "o", "markersize": 4, "linewidth": width}
            if points:
                time_axis.plot(*zip(*points, strict=True), label=name, **options)
            if memory:
                memory_axis.plot(*zip(*memory, strict=True), label=name, **options)
        time_axis.axhline(1.0, color="#b45309", linewidth=1.2, linestyle=(0, (4, 2)))
        time_axis.set_title(kind)
        time_axis.set_ylabel("time over the floor")
        time_axis.set_ylim(bottom=0)
        time_axis.legend(fontsize=8, loc="lower right")
        memory_axis.set_ylabel("peak GiB")
        memory_axis.set_yscale("log")
        for axis in (time_axis, memory_axis):
            axis.grid(True)
            axis.set_xscale("log", base=2)
        _label_tokens(memory_axis, [table["tokens_real"] for table in tables])
    return figure


def _label_tokens(axis: Axes, tokens: list[int]) -> None:
    labels = [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens]
    axis.set_xticks(tokens, labels)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens")


def _kernels(record: Json) -> Figure:
    attention = [table for table in record["tables"] if table["flops"]]
    heads = list(dict.fromkeys((t["num_heads"], t["num_kv_heads"]) for t in attention))
    figure, axes = new_figure(
        record,
        "Attention kernels, forward and backward",
        1,
        len(heads),
        (5.4 * len(heads), 3.8),
        sharey=True,
    )
    rows = list(dict.fromkeys(row["name"] for table in attention for row in timed(table)))
    for axis, pair in zip(axes[0], heads, strict=True):
        tables = [t for t in attention if (t["num_heads"], t["num_kv_heads"]) == pair]
        for name, color in zip(rows, (OURS, *LINES), strict=False):
            points = [
                (table["seqlen"], row["tflops"])
                for table in tables
                for row in timed(table)
                if row["name"] == name
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=color, marker="o", markersize=4, label=name
                )
        axis.axhline(record["ceilings"]["matmul_tflops"], color="#b45309", linestyle=(0, (4, 2)))
        axis.set_title(f"{pair[0]} heads, {pair[1]} kv heads")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(True)
        _label_tokens(axis, sorted({table["seqlen"] for table in tables}))
        axis.set_xlabel("tokens of a sequence")
    axes[0][0].set_ylabel("TFLOP/s (dashed: a matrix product)")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    return figure


def _losscurve(record: Json) -> Figure:
    tables = [table for table in record["tables"] if table["difference"]]
    model = tables[0]["model"] if tables else ""
    figure, axes = new_figure(
        record,
        f"The same loss curve, {model}",
        2,
        max(1, len(tables)),
        (5.4 * max(1, len(tables)), 5.2),
        sharex=True,
        height_ratios=(2, 1),
    )
    for column, table in enumerate(tables):
        curve, difference = axes[0][column], axes[1][column]
        stock, patched = (row["losses"] for row in table["rows"])
        steps = range(1, len(stock) + 1)
        curve.plot(steps, stock, color=PEER_LIGER, linewidth=5, label="as it is")
        curve.plot(steps, patched, color=OURS, linewidth=1.5, label="patched")
        curve.set_title(table["case"])
        curve.set_ylabel("loss")
        curve.legend(fontsize=8.5)
        same_weights = table["rows"][0]["patched_on_same_weights"]
        runs, same = (
            [(b - a) / a for a, b in zip(stock, others, strict=True)]
            for others in (patched, same_weights)
        )
        difference.axhline(0, color="#9ca3af", linewidth=1)
        difference.plot(steps, runs, color=PEER, linewidth=1, label="two runs")
        difference.plot(
            steps, same, color=OURS, linewidth=0, marker=".", label="on the same weights"
        )
        bound = 1.15 * max(map(abs, [*runs, *same])) or 1e-9
        difference.set_ylim(-bound, bound)
        difference.legend(fontsize=8, ncols=2, loc="lower left")
        difference.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        difference.set_ylabel("relative difference")
        difference.set_xlabel("step")
        for axis in (curve, difference):
            axis.grid(True)
    return figure


_PLOTS: dict[str, Callable[[Json], Any]] = {
    "step": _step,
    "generation": plot_generation,
    "layer": _layer,
    "lengths": _lengths,
    "kernels": _kernels,
    "cpu_step": _step,
    "losscurve": _losscurve,
    "sequence_parallel": plot_timelines,
}
