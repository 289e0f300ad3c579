"""A lengths report for people: a rich table that fits 80 columns, and a chart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from padless.environment import import_optional

if TYPE_CHECKING:
    from padless.lengths.report import LengthsReport

_BAR_WIDTH = 32


def render(report: LengthsReport, *, width: int) -> str:
    """Renders the table as plain text of so many columns, without spaces at the ends of lines."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(table(report))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def table(report: LengthsReport) -> Table:
    """Makes the table."""
    out = Table.grid(padding=(0, 0))
    out.add_row(_headline(report))
    out.add_row(_histogram(report))
    out.add_row(_costs(report))
    return out


def _headline(report: LengthsReport) -> str:
    cut = ""
    if report.max_length is not None:
        cut = f", {report.truncated_examples:,} of them cut at {report.max_length:,}"
    marks = ", ".join(f"{p} % {value:,}" for p, value in report.percentiles.items())
    return (
        f"[bold]{report.examples:,} examples[/]{cut}, {report.tokens:,} tokens\n"
        f"{report.shortest:,} to {report.longest:,} tokens each, mean {report.mean:,.1f}\n"
        f"percentiles: {marks}"
    )


def _histogram(report: LengthsReport) -> Table:
    out = Table(box=SIMPLE_HEAD, pad_edge=False)
    out.add_column("length", justify="right", no_wrap=True)
    out.add_column("examples", justify="right", no_wrap=True)
    out.add_column("", width=_BAR_WIDTH)
    most = max(count for _, _, count in report.histogram)
    for first, last, count in report.histogram:
        name = f"{first:,}" if first == last else f"{first:,} - {last:,}"
        out.add_row(name, f"{count:,}", Bar(most, 0, count, width=_BAR_WIDTH))
    return out


def _costs(report: LengthsReport) -> Table:
    out = Table(box=SIMPLE_HEAD, pad_edge=False)
    out.add_column("an epoch computes", no_wrap=True)
    out.add_column("tokens", justify="right", no_wrap=True)
    out.add_column("of them real", justify="right", no_wrap=True)
    out.add_column("")
    kind = "grouped by length" if report.group_by_length else "shuffled"
    note = f"batches of {report.batch_size}, {kind}"
    if report.pad_to_multiple_of > 1:
        note += f", to multiples of {report.pad_to_multiple_of}"
    out.add_row(
        "with padding", f"{report.padded_tokens:,.0f}", f"{1 - report.padding_share:.1%}", note
    )
    if report.packed_tokens is not None:
        share = report.tokens / report.packed_tokens
        rows = f"{report.packed_rows:,} rows of {report.max_length:,}"
        out.add_row("packed to rows", f"{report.packed_tokens:,}", f"{share:.1%}", rows)
    out.add_row("real tokens only", f"{report.tokens:,}", "100.0%", "padless")
    out.add_section()
    out.add_row("most it can gain", f"{report.token_speedup:.2f} x", "", "all but attention")
    out.add_row("", f"{report.attention_speedup:.2f} x", "", "attention's products")
    return out


def plot(report: LengthsReport, path: Path) -> None:
    """Draws the histogram into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_module, reason = import_optional("matplotlib.figure")
    if figure_module is None:
        raise ImportError(f"plot needs matplotlib; run `pip install 'padless[plot]'` ({reason})")
    # Not pyplot: it would choose a backend for the whole process.
    figure = figure_module.Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    lefts = [first for first, _, _ in report.histogram]
    width = report.histogram[0][1] - report.histogram[0][0] + 1
    axes.bar(lefts, [n for _, _, n in report.histogram], width=width, align="edge", linewidth=0)
    padded = report.padded_tokens / report.examples
    for value, name, style in (
        (report.mean, f"mean: {report.mean:,.0f} tokens", "-"),
        (padded, f"mean row, padded in batches of {report.batch_size}: {padded:,.0f}", "--"),
    ):
        axes.axvline(value, color="black", linestyle=style, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("examples")
    axes.set_title(f"{report.padding_share:.0%} of the padded batches is padding")
    axes.legend()
    figure.savefig(path)
