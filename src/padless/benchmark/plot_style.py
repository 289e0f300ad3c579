"""Colours, type and frame that all plots share."""

from __future__ import annotations

from typing import Any

from padless.benchmark.names import PADLESS, with_liger

Json = dict[str, Any]

# Ours stands out; peers are grey, floors are lines.
OURS, OURS_LIGER = "#0f766e", "#5eb5aa"
PEER, PEER_LIGER = "#8b93a1", "#c3c8d1"
INK, FAINT = "#1f2937", "#e5e7eb"
LINES = ("#b45309", "#4f6bb0", "#8b5a9e", "#8b93a1", "#c27b8e", "#6b8e4e")
STYLE = {
    "figure.facecolor": "white",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "font.size": 9.5,
    "grid.color": FAINT,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
}


def new_figure(record: Json, title: str, rows: int, columns: int, size: Any, **options: Any) -> Any:
    """Makes a figure with its title on top and hardware and versions at its foot.

    Args:
        record: whose they are.
        title: of the figure.
        rows: of panels.
        columns: of panels.
        size: inches.
        options: of `plt.subplots`.

    Returns:
        The figure and its axes, `(rows, columns)`.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    figure.suptitle(title, x=0.005, ha="left", fontsize=13, fontweight="bold")
    versions = record["versions"]
    shown = ("torch", "transformers", "flash-attn-4", "liger-kernel")
    found = [f"{name} {versions[name]}" for name in shown if versions.get(name)]
    foot = f"{record['hardware']['device']}, {', '.join(found)}, {record['date']}"
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=8, color="#6b7280")
    return figure, axes


def timed(table: Json, measure: str = "forward_backward_ms") -> list[Json]:
    """Finds the rows that have times, of forward and backward or another measure."""
    return [row for row in table["rows"] if row["reason"] is None and measure in row]


def color_of(name: str) -> str:
    """Chooses a row's colour by its name."""
    is_liger = name.endswith(with_liger(""))
    if name.startswith(PADLESS):
        return OURS_LIGER if is_liger else OURS
    return PEER_LIGER if is_liger else PEER
