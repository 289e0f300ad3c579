"""`padless doctor`: what this machine can run, why not the rest, and what to do next."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# What takes less needs no spinner.
_PATIENCE_S = 2.0


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which an import counts as hanging.", min=0.1)
    ] = 60.0,
) -> None:
    """Show what this machine can run, why not the rest, and what to do next.

    Exit code 0: some attention backend serves, be it slowly; 1: nothing can run, because torch is
    missing or broken; 2: the request cannot be carried out.
    """
    from padless.diagnosis import doctor

    with _spinner(Console(stderr=True), shown=not as_json) as on_progress:
        diagnosis = doctor(limit_s=time_limit, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        from padless.cli.doctor_table import print_diagnosis

        print_diagnosis(diagnosis, Console())
    raise typer.Exit(0 if diagnosis.ok else 1)


@contextmanager
def _spinner(console: Console, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Gives what takes the name of a stage; shows it from the second that it is waited for."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    )
    task = progress.add_task("")
    timer = threading.Timer(_PATIENCE_S, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda stage: progress.update(task, description=stage)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
