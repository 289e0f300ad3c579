"""A bar chart of one table: a bar a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from padless.benchmark.names import PADLESS
from padless.benchmark.plot_style import INK, Json, color_of, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_bars(
    axis: Axes, table: Json, measure: str = "forward_backward_ms", *, room: float = 0.0
) -> None:
    """Draws a bar a row, fastest on top, with its time and its multiple of the floor.

    Args:
        axis: to draw on.
        table: of a record.
        measure: whose medians are drawn.
        room: how far the axis goes at least, over the largest 80th percentile: labels stand behind
            it where a row was disturbed.
    """
    rows = sorted(timed(table, measure), key=lambda row: -row[measure]["median"])
    floor = table.get("floor_ms")
    times = [row[measure]["median"] for row in rows]
    places = range(len(rows))
    axis.barh(places, times, color=[color_of(row["name"]) for row in rows], height=0.72)
    for place, row, ms in zip(places, rows, times, strict=True):
        spread = row[measure]
        axis.plot([spread["p20"], spread["p80"]], [place, place], color=INK, linewidth=1)
        label = f" {ms:.0f} ms" if ms >= 20 else f" {ms:.1f} ms"
        if floor:
            label += f", {ms / floor:.2f} x floor"
        elif "again_ms" in row:
            label += f", {row['again_ms']['median']:.0f} ms when met again"
        weight = "bold" if row["name"].startswith(PADLESS) else "normal"
        end = max(ms, spread["p80"])
        axis.text(end, place, label, va="center", fontsize=8.5, fontweight=weight)
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=8.5)
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row["name"].startswith(PADLESS) else "normal")
    if floor:
        axis.axvline(floor, color="#b45309", linewidth=1.2, linestyle=(0, (4, 2)))
        note = f"floor {floor:.0f} ms" if floor >= 20 else f"floor {floor:.2g} ms"
        axis.text(floor, len(rows) - 0.4, note, color="#b45309", fontsize=8.5, va="bottom")
    axis.set_title(table["case"], pad=20)
    axis.set_xlim(0, max(1.4 * max(times), room * max(row[measure]["p80"] for row in rows)))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("milliseconds")
    axis.grid(axis="x")
