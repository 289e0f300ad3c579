"""`padless bench`: a step of the user's model, unpatched, patched and by its peers, by turns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from padless.cli.interrupt import terminable
from padless.cli.options import DTYPES, check_device, quiet_transformers

if TYPE_CHECKING:
    from padless.benchmark import BenchReport

_DEFAULT_MODEL = "smollm2-135m"
# The whole model would take three times as long a step: two cores end within two minutes so.
_DEFAULT_CPU_LAYERS = 4
_INTERRUPTED = 130


def bench_command(
    model: Annotated[
        str, typer.Option(help="Folder of a LLaMA, or llama-7b, llama3-8b, smollm2-135m.")
    ] = _DEFAULT_MODEL,
    layers: Annotated[
        int | None, typer.Option(help="Cut the model to its first N layers.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    seqlen: Annotated[
        int | None, typer.Option(help="Longest row, in tokens; default 2048 on a GPU, else 128.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="File of your own lengths: one a line, or a JSON list.")
    ] = None,
    distribution: Annotated[
        str, typer.Option(help="Lengths otherwise: uniform, lognormal or full.")
    ] = "uniform",
    fixed_lengths: Annotated[
        bool, typer.Option("--fixed-lengths", help="One batch, not new lengths at every step.")
    ] = False,
    forward: Annotated[
        bool, typer.Option("--forward", help="Forward alone, without the backward.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(DTYPES)}; default bfloat16 on a GPU, else float32."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if there is one.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="By commas: sdpa, eager, flash_attention_2, flash_attention_4, liger, compile; "
            "or all, or none; default all but compile."
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not verify the numbers first.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Of timing in all.")] = 20.0,
    warmup_seconds: Annotated[
        float, typer.Option(help="Give a peer up that is not warm by then; a step is not cut off.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="Of lengths, tokens and random weights.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the PNG.")] = Path(
        "padless-bench"
    ),
) -> None:
    """Time a step of a model, unpatched, patched and by its peers, on this machine.

    Exit code 0: measured; 1: the verification or padless failed; 2: the request cannot be carried
    out; 130: interrupted by Ctrl-C or SIGTERM, with what was measured until then.
    """
    from padless.errors import PadlessError

    errors = Console(stderr=True)
    options: dict[str, Any] = {
        "batch": batch,
        "seqlen": seqlen,
        "distribution": distribution,
        "fixed_lengths": fixed_lengths,
        "forward_only": forward,
        "verify_first": not no_verify,
        "seconds": seconds,
        "warmup_seconds": warmup_seconds,
        "seed": seed,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with terminable():
            report = _bench(model, layers, lengths, dtype, device, peers, out, options, errors)
    except KeyboardInterrupt:
        errors.print("padless bench: interrupted before anything was measured")
        raise typer.Exit(_INTERRUPTED) from None
    except (PadlessError, ValueError, TypeError, OSError) as error:
        errors.print(f"padless bench: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    from padless.cli.bench_table import print_report

    print_report(report, Console())
    for path in _write(report, out, lambda text: typer.echo(f"padless bench: {text}", err=True)):
        typer.echo(f"written: {path}")
    if report.is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(0 if report.passed else 1)


def _bench(
    model: str,
    layers: int | None,
    lengths: Path | None,
    dtype: str | None,
    device: str | None,
    peers: str | None,
    out: Path,
    options: dict[str, Any],
    errors: Console,
) -> BenchReport:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    with _stages(errors) as on_progress:
        on_progress("loading torch and transformers", 0, 0)
        import torch

        from padless.benchmark import DEFAULT_PEERS, PEERS, bench, read_lengths
        from padless.benchmark.peers import check_peers

        quiet_transformers()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        named = {None: DEFAULT_PEERS, "all": PEERS, "none": ()}
        chosen = named[peers] if peers in named else tuple(peers.split(","))  # type: ignore[union-attr]
        own = None if lengths is None else read_lengths(lengths)
        check_peers(chosen)
        is_default = model == _DEFAULT_MODEL and layers is None
        if is_default and torch.device(device).type == "cpu":
            layers = _DEFAULT_CPU_LAYERS
        on_progress(f"loading {model}", 0, 0)
        llama, name = _load(model, layers, dtype, device, options)

        def on_partial(report: BenchReport) -> None:
            def say(text: str) -> None:
                on_progress(text, 0, 0)

            try:
                for path in _write(report, out, say):
                    say(f"written until now: {path}")
            except OSError as error:
                # At the end it is tried again, with all that there is.
                say(f"not written until now: {error}")

        return bench(
            llama,
            lengths=own,
            peers=chosen,
            name=name,
            on_progress=on_progress,
            on_partial=on_partial,
            **options,
        )


@contextmanager
def _stages(errors: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what takes stage, done and total: a bar on a terminal, elsewhere a line a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    said = ""
    with shown as progress:
        task = progress.add_task("", total=None)

        def on_progress(stage: str, done: int, total: int) -> None:
            nonlocal said
            progress.update(task, description=stage, completed=done, total=total or None)
            if stage != said and not errors.is_terminal:
                # Not by rich, which folds where a log has no width.
                typer.echo(f"padless bench: {stage}", err=True)
            said = stage

        yield on_progress


def _load(
    model: str, layers: int | None, dtype: str, device: str, options: dict[str, Any]
) -> tuple[Any, str]:
    """Loads a folder, or builds a named shape; returns the model and its name for people."""
    import torch

    from padless.benchmark.models import NAMED, build_llama, cut
    from padless.checkpoint import load_llama
    from padless.demo import prepare_demo_model
    from padless.errors import CheckpointError

    folder, name, kind = Path(model), Path(model).resolve().name, getattr(torch, dtype)
    remark = ""
    if model in NAMED and not folder.is_dir():
        name = model
        try:
            if model != _DEFAULT_MODEL:
                raise CheckpointError("of this shape no weights are known")
            folder = prepare_demo_model()
        except CheckpointError:
            shape = cut(NAMED[model], layers)
            torch.manual_seed(options["seed"])
            longest = max(2048, options["seqlen"] or 0)
            llama = build_llama(shape, dtype=kind, device=device, longest=longest)
            of = "" if layers is None else f", {layers} of {NAMED[model].num_layers} layers"
            return llama, f"{name} (random weights{of})"
    elif not folder.is_dir():
        raise ValueError(
            f"--model must be a folder or one of {', '.join(NAMED)}, got {model!r}; "
            f"padless downloads nothing"
        )
    llama = load_llama(folder, dtype=kind, device=device, num_layers=layers)
    if layers is not None:
        remark = f" (first {layers} layers)"
    return llama, f"{name}{remark}"


def _write(report: BenchReport, out: Path, remark: Callable[[str], None]) -> list[Path]:
    """Writes the JSON and, if there is a figure to draw, the PNG; returns what is there then."""
    from padless.benchmark.names import slug

    stem = out / f"bench-{slug(report.model)}-{slug(report.hardware['device'])}"
    path = stem.with_name(f"{stem.name}.json")
    work = path.with_suffix(".part")
    # Never half of it in the place of what was written before, whenever the process ends.
    work.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(work, path)
    if not any(row.reason is None for row in report.rows):
        return [path]
    try:
        from padless.benchmark.chart import draw_chart

        return [path, draw_chart(report, path.with_suffix(".png"))]
    except ImportError:
        remark('no chart, since matplotlib is missing; pip install "padless[plot]"')
        return [path]
