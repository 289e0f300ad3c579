"""The report of `padless verify` for people: one table that fits 80 columns, and a verdict."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from padless.verification.report import Check, PathReport, VerifyReport

_FUNCTION = {"patch": "padless.patch", "sdpa": "forward_2", "flash": "forward"}


def print_report(report: VerifyReport, console: Console) -> None:
    """Prints the report.

    Args:
        report: what `verify` returned.
        console: where to.
    """
    padding = 1 - report.real_tokens / (report.batch * report.seqlen)
    versions = report.versions
    console.print(f"[bold]{escape(report.model)}[/], {report.dtype} on {escape(report.device)}")
    console.print(
        f"transformers {versions['transformers']}, torch {versions['torch']}, "
        f"padless {versions['padless']}"
    )
    console.print(
        f"batch of {report.batch} x {report.seqlen}: {report.real_tokens} tokens, "
        f"{padding:.0%} padding; truth: the same model in {report.truth_dtype}"
    )
    for path in report.paths:
        console.print()
        console.print(_table(path))
    console.print()
    _print_verdict(report, console)


def _table(path: PathReport) -> Table:
    table = Table(
        title=f"{path.path} path ({_FUNCTION[path.path]})",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found")
    for check in path.checks:
        verdict = Text("ok", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(check.name, verdict, _found(check))
    table.add_section()
    table.add_row("backends", "", _backends(path))
    table.add_row(
        "tokens computed",
        "",
        f"{path.computed_tokens} of {path.batch_tokens} by "
        f"{'the whole model' if path.path == 'patch' else 'attention, each layer'}",
    )
    table.add_row(
        "training step",
        "",
        f"{path.step.patched_ms:.0f} ms, unpatched {path.step.stock_ms:.0f} ms "
        f"({path.step.stock_ms / path.step.patched_ms:.2f} x)",
    )
    return table


def _backends(path: PathReport) -> str:
    """Names the layers with what served them; alike layers together."""
    layers = Counter(" and ".join(sorted(layer.backends)) or "none" for layer in path.layers)
    return "; ".join(f"{count} layers: {names}" for names, count in layers.items())


def _found(check: Check) -> str:
    if check.rms_error is None:
        return check.detail
    short = (
        f"RMS {check.rms_error:.1e}, unpatched {check.stock_rms_error:.1e}, "
        f"allowed {check.rms_budget:.1e}"
    )
    return short if check.passed else check.detail


def _print_verdict(report: VerifyReport, console: Console) -> None:
    took = f"({report.num_layers} attention layers, {report.seconds:.0f} s)"
    if report.passed:
        console.print(f"[bold green]The patched model is the same model[/] {took}")
    else:
        console.print(f"[bold red]The patched model is NOT the same model[/] {took}")
