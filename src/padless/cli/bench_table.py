"""The report of `padless bench` for people: a table that fits 80 columns, and what it rests on."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from padless.benchmark.report import BenchReport, BenchRow


def print_report(report: BenchReport, console: Console) -> None:
    """Prints the report.

    Args:
        report: what `bench` returned.
        console: where to.
    """
    machine = report.hardware
    where = machine["device"]
    if machine["kind"] == "cpu":
        where += f", {machine['threads']} threads"
    console.print(f"[bold]{escape(report.model)}[/], {report.dtype} on {escape(where)}")
    versions = report.versions
    console.print(
        f"transformers {versions['transformers']}, torch {versions['torch']}, "
        f"padless {versions['padless']}"
    )
    console.print(_what(report))
    _print_verification(report, console)
    if report.is_interrupted:
        console.print("[bold red]interrupted[/]: what was measured until then")
    timed = [row for row in report.rows if row.reason is None]
    if timed:
        console.print()
        console.print(_table(timed, report))
        console.print(_notes(report, timed), highlight=False)
    missing = [row for row in report.rows if row.reason is not None]
    if missing:
        console.print()
        console.print(_reasons(missing))


def _what(report: BenchReport) -> str:
    step = "forward alone" if report.is_forward_only else "training step (forward and backward)"
    lengths = "one batch" if report.is_fixed else "new lengths at every step"
    source = "your lengths" if report.lengths_from == "lengths" else report.lengths_from
    text = f"{step}, {report.batch} rows up to {report.seqlen} tokens, {source}, {lengths}"
    return text if report.padding is None else f"{text}: {report.padding:.0%} padding"


def _print_verification(report: BenchReport, console: Console) -> None:
    failed = [check for check in report.checks if not check.passed]
    if not report.checks:
        console.print("numbers: not verified")
    elif not failed:
        console.print(f"numbers: verified, {len(report.checks)} checks [green]ok[/]")
    else:
        console.print(
            "[bold red]The patched model is NOT the same model[/], so nothing was timed; "
            "`padless verify` tells more, `--no-verify` times it all the same"
        )
        for check in failed:
            console.print(f"  [bold red]FAIL[/] {escape(check.name)}: {escape(check.detail)}")


def _table(rows: list[BenchRow], report: BenchReport) -> Table:
    # 80 columns hold "padless + Liger" at 99,999 ms and 9,999,999 tokens a second.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    headers = ("ms", "p20-p80", "tokens/s", "GiB", "speed-up", "of floor")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        style = "bold" if row.name.startswith("padless") else ""
        table.add_row(
            row.name,
            _number(row.median_ms),
            f"{_number(row.p20_ms)}-{_number(row.p80_ms)}",
            "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "n/a" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
            "-" if row.speed_up is None else f"{row.speed_up:.2f} x",
            "-" if row.floor_share is None else f"{row.floor_share:.0%}",
            style=style,
        )
    return table


def _notes(report: BenchReport, timed: list[BenchRow]) -> str:
    counts = [len(row.samples_ms) for row in timed]
    steps = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    lines = [f"steps of each: {steps}, by turns; unpatched is transformers' {report.attention}"]
    for row in timed:
        if row.backends:
            lines.append(f"{row.name}: attention by {', '.join(row.backends)}")
        for reason, count in (row.left_to_stock or {}).items():
            lines.append(f"{row.name}: {count} calls left to transformers: {reason}")
    if report.floor_ms is not None and report.ceilings is not None:
        rate = report.ceilings["matmul_tflops"]
        lines.append(
            f"floor: {_number(report.floor_ms)} ms, the products and attention of the real tokens "
            f"at the {rate:.3g} TFLOP/s that a matrix product reaches here"
        )
    return "\n".join(lines)


def _reasons(rows: list[BenchRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("not measured", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        table.add_row(row.name, escape(row.reason or ""))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1e5:
        return f"{value / 1e3:,.0f} s"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
