"""The bar chart of a report. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from padless.benchmark.bars import draw_bars
from padless.benchmark.plot_style import STYLE, new_figure
from padless.benchmark.report import BenchReport


def draw_chart(report: BenchReport, path: Path) -> Path:
    """Draws a bar a row into a PNG, each with its time, 20th and 80th percentile and the floor.

    Args:
        report: has at least one row with figures.
        path: of the file; its folder is there.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        {
            "name": row.name,
            "reason": None,
            "step_ms": {"median": row.median_ms, "p20": row.p20_ms, "p80": row.p80_ms},
        }
        for row in report.rows
        if row.reason is None
    ]
    kind = "forward alone" if report.is_forward_only else "forward and backward"
    lengths = "one batch" if report.is_fixed else "new lengths at every step"
    case = f"{report.batch} rows up to {report.seqlen} tokens, {report.lengths_from}, {lengths}"
    if report.padding is not None:
        case += f", {report.padding:.0%} padding"
    if report.is_interrupted:
        case += ", interrupted"
    with plt.rc_context(STYLE):
        figure, axes = new_figure(
            report.as_dict(), f"{report.model}, {report.dtype}: {kind}", 1, 1,
            (9.6, 2.4 + 0.36 * len(rows)),
        )  # fmt: skip
        table = {"case": case, "floor_ms": report.floor_ms, "rows": rows}
        draw_bars(axes[0][0], table, "step_ms", room=1.3)
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return path
