"""The plot of sequences that GPUs share: what one of them did when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.results_folder import Json
from padless.benchmark.plot_style import LINES, OURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LANES = {"computation": OURS, "communication": LINES[0]}


def has_timeline(record: Json) -> bool:
    """Whether a record of `benchmarks.sequence_parallel` was traced."""
    return bool(_tables(record))


def plot_timelines(record: Json) -> Figure:
    """Draws when the first rank computed and when it communicated, a panel for each batch.

    Args:
        record: of `benchmarks.sequence_parallel`, one that `has_timeline`.
    """
    tables = _tables(record)
    counts = [len(_rows(table)) for table in tables]
    figure, axes = new_figure(
        record,
        "One turn, forward and backward, on the first GPU",
        len(tables),
        1,
        (10.0, sum(1.0 + 0.62 * count for count in counts)),
        height_ratios=[1 + count for count in counts],
    )
    for line, table in zip(axes, tables, strict=True):
        axis, rows = line[0], _rows(table)
        for place, row in enumerate(rows):
            for lane, (name, color) in enumerate(_LANES.items()):
                stretches = row["timeline"][name]
                bars = [(first / 1e3, (last - first) / 1e3) for first, last in stretches]
                low = place + 0.42 * lane - 0.4
                axis.broken_barh(bars, (low, 0.36), color=color, label=None if place else name)
            hidden = row["timeline"]["communication_hidden"]
            end = max(last for name in _LANES for _, last in row["timeline"][name]) / 1e3
            if hidden is not None:
                axis.text(end, place, f"  {hidden:.0%} hidden", va="center", fontsize=8.5)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_title(table["case"])
        axis.grid(axis="x")
        axis.set_xlabel("milliseconds")
    axes[0][0].legend(fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.0))
    return figure


def _tables(record: Json) -> list[Json]:
    return [table for table in record["tables"] if _rows(table)]


def _rows(table: Json) -> list[Json]:
    return [row for row in table["rows"] if row.get("timeline")]
