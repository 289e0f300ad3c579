"""Run the golden tests on the transformers versions of `pins.toml`.

python -m tests.matrix.run --versions oldest,newest
python -m tests.matrix.run --versions 4.28.1,4.46.3 -- -k logits
python -m tests.matrix.run --write-docs
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .overlays import (
    CHECKOUT,
    ERAS,
    Era,
    MatrixError,
    build_overlay,
    load_eras,
    overlay_is_current,
    select_eras,
)
from .table import Grid, Result, totals, write_between_markers

GOLDEN = "tests/golden"
TAIL_LINES = 40
POLL_S = 0.3


def main(
    pytest_args: Annotated[
        list[str] | None, typer.Argument(help="After --: more arguments for pytest.")
    ] = None,
    versions: Annotated[
        str, typer.Option(help="all, oldest, newest, versions or era letters; comma-separated.")
    ] = "all",
    jobs: Annotated[int, typer.Option(min=1, help="Versions at the same time.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds that one version may take.")] = 900,
    write_docs: Annotated[
        bool,
        typer.Option("--write-docs", help="Put the table in docs/versions.md; all versions only."),
    ] = False,
) -> None:
    """Run the golden tests on each transformers version and print a table version x case."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    start = time.monotonic()
    try:
        eras = load_eras()
        chosen = select_eras(eras, versions)
        if write_docs and (chosen != eras or pytest_args):
            raise MatrixError("--write-docs is for the whole matrix with all its tests")
    except MatrixError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(2) from error

    results = run_matrix(chosen, jobs, timeout, pytest_args or [], console)
    show(results, console)
    console.print(f"versions: {len(results)}, seconds: {time.monotonic() - start:.0f}")
    if write_docs:
        write_between_markers(CHECKOUT / "docs" / "versions.md", Grid(results).markdown())
    total = totals(results)
    # Plain, and last: what a log reader looks for.
    print(", ".join(f"{count} {name}" for name, count in total.items()))
    raise typer.Exit(1 if total["failed"] else 0)


def run_matrix(
    eras: list[Era], jobs: int, timeout: float, pytest_args: list[str], console: Console
) -> list[Result]:
    """Run the versions, some at a time, and show what they do; results in the order of `eras`."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    stop = threading.Event()
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("matrix", total=len(eras), state="")

        def work(era: Era) -> Result:
            task = progress.add_task(era.transformers, total=100, state="starting")
            tell = functools.partial(progress.update, task)
            result = run_era(era, timeout, pytest_args, stop, tell)
            progress.remove_task(task)
            progress.advance(overall)
            progress.console.print(_summary(result), highlight=False)
            return result

        pool = ThreadPoolExecutor(jobs)
        try:
            futures: list[Future[Result]] = [pool.submit(work, era) for era in eras]
            return [future.result() for future in futures]
        finally:
            # Reached by Ctrl-C too: end the tests that run, start no others.
            stop.set()
            pool.shutdown(cancel_futures=True)


def run_era(
    era: Era,
    timeout: float,
    pytest_args: list[str],
    stop: threading.Event,
    tell: Callable[..., None],
) -> Result:
    """Build one overlay if needed and run the golden tests over it."""
    result = Result(era)
    if not era.runs_on():
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        result.absent = f"no wheels for Python {python}"
        return result
    if not overlay_is_current(era):
        tell(state="installing")
    try:
        overlay = build_overlay(era)
    except MatrixError as error:
        result.problem, result.tail = "not installed", str(error)
        return result

    log, report = (ERAS / "logs" / f"{era.transformers}.{end}" for end in ("log", "json"))
    log.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    start = time.monotonic()
    code = _run_pytest(overlay, report, log, timeout, pytest_args, stop, tell)
    result.seconds = time.monotonic() - start
    if report.exists():
        result.report = json.loads(report.read_text("utf-8"))
    result.problem = _problem(code, result, timeout, stop)
    if result.problem:
        lines = log.read_text("utf-8", errors="replace").splitlines()
        result.tail = "\n".join(lines[-TAIL_LINES:])
    return result


def _run_pytest(
    overlay: Path,
    report: Path,
    log: Path,
    timeout: float,
    pytest_args: list[str],
    stop: threading.Event,
    tell: Callable[..., None],
) -> int | None:
    """Return pytest's exit code, or None when it ran out of time."""
    path = os.pathsep.join([str(overlay), str(CHECKOUT / "src")])
    # One thread each: the versions share the cores.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    # The percentages in the log drive the progress bar.
    env["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-m", "pytest", GOLDEN, "-q", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "--tb=short", "--case-report", str(report), *pytest_args]
    deadline = time.monotonic() + timeout
    # A file and not a pipe: a child of pytest that outlives it cannot keep us waiting.
    with log.open("wb") as output, log.open("rb") as seen:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline or stop.wait(POLL_S):
                    return None
                if percent := re.findall(rb"\[ *(\d+)%\]", seen.read()):
                    tell(completed=int(percent[-1]))
                tell(state="testing")
        finally:
            process.kill()
            process.wait()
    return process.returncode


def _problem(code: int | None, result: Result, timeout: float, stop: threading.Event) -> str:
    counts = result.counts
    if code is None:
        return "interrupted" if stop.is_set() else f"stopped after {timeout:.0f} s"
    if counts["failed"]:
        return f"{counts['failed']} failed"
    if code not in (0, 5):
        return f"pytest ended with {code}"
    return "" if counts["passed"] else "no test ran"


def _summary(result: Result) -> str:
    name = f"{result.era.transformers:>7}"
    if result.absent:
        return f"{name}  [dim]{result.absent}[/dim]"
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    mark = f"[bold red]{result.problem}[/bold red]" if result.problem else "[green]ok[/green]"
    return f"{name}  {mark}  {counts} in {result.seconds:.0f} s"


def show(results: list[Result], console: Console) -> None:
    """Print the failures' output, then the table and the reasons of what was skipped."""
    for result in results:
        if result.problem:
            console.rule(f"[red]transformers {result.era.transformers}: {result.problem}")
            # Indented, so that no line of it reads as the matrix's own counts.
            for line in result.tail.splitlines():
                console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
    grid = Grid(results)
    console.print(*grid.rich(console.width), sep="\n")
    for line in grid.footnotes():
        console.print(line, markup=False, highlight=False, style="dim")


if __name__ == "__main__":
    typer.run(main)
