"""Plot of generation: what a decoded token takes, and the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.markdown import number
from benchmarks.results_folder import Json
from padless.benchmark.plot_style import INK, color_of, new_figure, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = "#b45309"


def plot_generation(record: Json) -> Figure:
    """Draws a panel a case.

    Args:
        record: of `benchmarks.generation`.
    """
    tables = [table for table in record["tables"] if timed(table, "decode_ms")]
    counts = [len(timed(table, "decode_ms")) for table in tables] or [1]
    figure, axes = new_figure(
        record,
        "Batched generation: a decoded token, and the first one",
        len(counts),
        1,
        (9.6, sum(1.2 + 0.29 * count for count in counts)),
        height_ratios=[2 + count for count in counts],
    )
    for line, table in zip(axes, tables, strict=False):
        _bars(line[0], table)
    return figure


def _bars(axis: Axes, table: Json) -> None:
    """Draws a bar a row, fastest on top."""
    floor = table["decode_floor_ms"]
    rows = sorted(timed(table, "decode_ms"), key=lambda row: -row["decode_ms"]["median"])
    times = [row["decode_ms"]["median"] for row in rows]
    places = range(len(rows))
    axis.barh(places, times, color=[color_of(row["name"]) for row in rows], height=0.72)
    for place, row, ms in zip(places, rows, times, strict=True):
        spread = row["decode_ms"]
        axis.plot([spread["p20"], spread["p80"]], [place, place], color=INK, linewidth=1)
        first = row["prefill_ms"]["median"]
        label = f" {number(ms)} ms, {number(ms / floor)} x floor; first token {number(first)} ms"
        weight = "bold" if row["name"].startswith("padless") else "normal"
        end = max(ms, spread["p80"])
        axis.text(end, place, label, va="center", fontsize=8.5, fontweight=weight)
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=8.5)
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row["name"].startswith("padless") else "normal")
    axis.axvline(floor, color=_FLOOR, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.text(
        floor, len(rows) - 0.4, f"floor {floor:.2g} ms", color=_FLOOR, fontsize=8.5, va="bottom"
    )
    axis.set_title(table["case"], pad=20)
    axis.set_xlim(0, 1.6 * max(*times, floor))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("milliseconds a token")
    axis.grid(axis="x")
