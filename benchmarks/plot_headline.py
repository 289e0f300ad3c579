"""The one plot that the README shows: a few rows of the training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.results_folder import Json, median_ms
from padless.benchmark.plot_style import STYLE, color_of, new_figure, timed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "headline.png"
_ROWS = (
    names.SDPA,
    names.FA4,
    names.FA4_BY_HAND,
    names.PADLESS_TORCH,
    names.PADLESS,
    names.with_liger(names.PADLESS),
)


def draw_headline(records: Sequence[Json], folder: Path) -> Path | None:
    """Draws the training step of the first GPU among the records, which the README speaks of.

    Args:
        records: as `results_folder.load` gives them.
        folder: where to; has to be there.

    Returns:
        The file; None if no record has a training step.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record for record in records if record["name"] == "step"]
    if not steps:
        return None
    with plt.rc_context(STYLE):
        figure = headline(steps[0])
        path = folder / FILE
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return path


def headline(record: Json) -> Figure:
    """Draws the first table of a training step, and the one with new lengths at every step."""
    tables = [table for table in record["tables"] if timed(table)]
    chosen = tables[:1] + [t for t in tables[1:] if any("again_ms" in row for row in timed(t))][:1]
    figure, axes = new_figure(
        record, "A training step on a padded batch", 1, len(chosen), (10.5, 3.0), sharey=True
    )
    shown = list(reversed(_ROWS))
    for axis, table in zip(axes[0], chosen, strict=True):
        times = [median_ms(table, name) for name in shown]
        axis.barh(shown, [ms or 0.0 for ms in times], color=[color_of(n) for n in shown])
        for place, (name, ms) in enumerate(zip(shown, times, strict=True)):
            weight = "bold" if name.startswith("padless") else "normal"
            text = "not measured" if ms is None else f"{ms:.0f} ms"
            axis.text(ms or 0.0, place, f" {text}", va="center", fontweight=weight)
        axis.set_title(table["case"])
        axis.set_xlim(0, 1.2 * max(ms or 0.0 for ms in times))
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("milliseconds, forward and backward")
        axis.grid(axis="x")
    for label in axes[0][0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("padless") else "normal")
    return figure
