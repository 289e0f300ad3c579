"""`padless doctor`: what this machine can run, why not the rest, and what to do next."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from padless.cli.interrupt import terminable

# What takes less needs no progress bar.
_PATIENCE_S = 1.0
_INTERRUPTED = 130


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which an import counts as hanging.", min=0.1)
    ] = 60.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Begin no measurement after this many seconds of measuring, inf for no end; "
            "default 20 for what is needed most and 5 for the rest.",
            min=0,
        ),
    ] = None,
    measure_all: Annotated[
        bool, typer.Option("--all", help="Measure everything, however long it takes.")
    ] = False,
) -> None:
    """Show what this machine can run, why not the rest, and what to do next.

    Exit code 0: some attention backend serves, be it slowly; 1: nothing can run, because torch is
    missing or broken; 2: the request cannot be carried out; 130: interrupted, with what was found
    until then.
    """
    from padless.diagnosis import doctor

    errors = Console(stderr=True)
    try:
        with terminable(), _progress(errors, shown=not as_json) as on_progress:
            diagnosis = doctor(
                limit_s=time_limit,
                seconds=math.inf if measure_all else seconds,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        errors.print("padless doctor: interrupted before anything was found")
        raise typer.Exit(_INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        from padless.cli.doctor_table import print_diagnosis

        print_diagnosis(diagnosis, Console())
    if diagnosis.is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(0 if diagnosis.ok else 1)


@contextmanager
def _progress(console: Console, *, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what takes stage, done and total; shows them as soon as somebody waits for them.

    On a terminal that is a bar, which is gone afterwards; elsewhere one line.
    """
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("", total=None)

    def begin() -> None:
        if console.is_terminal:
            progress.start()
        else:
            console.print("padless doctor: importing packages and measuring attention backends")

    def tell(stage: str, done: int, total: int) -> None:
        progress.update(task, description=stage, completed=done, total=total or None)

    timer = threading.Timer(_PATIENCE_S, begin if shown else lambda: None)
    timer.daemon = True
    timer.start()
    try:
        yield tell
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
