"""Draws docs/img/flow.svg, the way of a padded batch: `python docs/pictures/flow.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

LENGTHS = (9, 4, 7)
COLUMNS = 9
COLORS = ("#0f766e", "#d97706", "#6366f1")
PADDING, INK = "#e5e7eb", "#1f2937"


def _cell(axes: Axes, x: float, y: float, color: str, size: float = 1.0) -> None:
    axes.add_patch(Rectangle((x, y), size, size, facecolor=color, edgecolor="white", linewidth=1))


def _padded(axes: Axes, x: float, y: float) -> None:
    for row, length in enumerate(LENGTHS):
        for column in range(COLUMNS):
            color = COLORS[row] if column < length else PADDING
            _cell(axes, x + column, y - row, color)


def _flat(axes: Axes, x: float, y: float) -> None:
    position = 0
    for row, length in enumerate(LENGTHS):
        for _ in range(length):
            _cell(axes, x + position, y, COLORS[row])
            position += 1


def _mask(axes: Axes, x: float, y: float, size: float) -> None:
    """Draws which key each query of the flat row sees: a triangle for each sequence."""
    start = 0
    total = sum(LENGTHS)
    axes.add_patch(
        Rectangle((x, y - (total - 1) * size), total * size, total * size, facecolor="#f3f4f6")
    )
    for row, length in enumerate(LENGTHS):
        for i in range(length):
            for j in range(i + 1):
                _cell(axes, x + (start + j) * size, y - (start + i) * size, COLORS[row], size)
        start += length


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "mutation_scale": 14}
    axes.annotate("", xy=end, xytext=begin, arrowprops=style)


def _text(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    axes.text(x, y, text, **{"color": INK, "fontsize": 11, "va": "center", **options})


def draw() -> plt.Figure:
    """Draws the picture."""
    figure, axes = plt.subplots(figsize=(10, 6.3))
    axes.set_xlim(-0.5, 37.5)
    axes.set_ylim(-16.2, 6.2)
    axes.set_aspect("equal")
    axes.axis("off")

    _text(axes, 0, 5.2, "a padded batch: 20 tokens in 27 slots", weight="bold")
    _padded(axes, 0, 3.2)
    _arrow(axes, (4.5, 0.8), (4.5, -1.6))
    _text(axes, 5.2, -0.4, "unpad once, at the model's door; one transfer to the host")

    _text(axes, 21.4, -2.5, "one row of real tokens")
    _flat(axes, 0, -3)
    _arrow(axes, (4.5, -3.4), (4.5, -5.2))

    box = FancyBboxPatch(
        (0, -10.4), 20, 5, boxstyle="round,pad=0,rounding_size=0.5", facecolor="#f0fdfa",
        edgecolor="#0f766e", linewidth=1.4,
    )  # fmt: skip
    axes.add_patch(box)
    _text(axes, 10, -6.5, "embedding, norms, projections, MLP, head, loss", ha="center")
    _text(axes, 10, -7.7, "Hugging Face's own, on real tokens only", ha="center", weight="bold")
    _text(axes, 10, -9.3, "attention: padless", ha="center", weight="bold", color="#0f766e")
    _arrow(axes, (20, -9.3), (23.4, -9.3))
    _mask(axes, 23.8, -6.1, 0.42)
    _text(
        axes, 28, -15.2, "within each sequence,\nby the best kernel that proved itself", ha="center"
    )

    _arrow(axes, (4.5, -10.8), (4.5, -12.4))
    _text(axes, 5.2, -11.6, "pad back once, what is read")
    _padded(axes, 0, -13.7)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.fonttype"] = "path"
    matplotlib.rcParams["svg.hashsalt"] = "padless"
    target = Path(__file__).parents[1] / "img" / "flow.svg"
    draw().savefig(target, bbox_inches="tight", metadata={"Date": None})
