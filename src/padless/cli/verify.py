"""`padless verify`: the patch at work on a real LLaMA, with proof that it is the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from padless.cli.options import DTYPES, check_device, quiet_transformers

if TYPE_CHECKING:
    from padless.verification import VerifyReport

# Four texts of 17 to 71 tokens: half of the batch is padding, and two cores end in a minute.
_DEMO_TEXTS = (2, 0, 1, 5)
_DEMO_NAME = "SmolLM2-135M-Instruct"


def verify_command(
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a LlamaForCausalLM; default: SmolLM2-135M-Instruct."),
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="Text file, one text a line; default: own English prose.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} (slow on a CPU).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    path: Annotated[
        str, typer.Option(help="patch, sdpa (forward_2), flash (forward), or all.")
    ] = "all",
    new_tokens: Annotated[int, typer.Option(help="Greedy tokens to compare.", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check on a real model that the patch changes nothing but speed.

    Exit code 0: the same model; 1: not the same; 2: the request cannot be carried out.
    """
    from padless.errors import PadlessError

    errors = Console(stderr=True)
    try:
        report = _verify(model, batch, dtype, device, path, new_tokens, errors)
    except (PadlessError, ValueError, TypeError, OSError) as error:
        errors.print(f"padless verify: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        from padless.cli.verify_table import print_report

        print_report(report, Console())
    raise typer.Exit(0 if report.passed else 1)


def _verify(
    model: Path | None,
    batch: Path | None,
    dtype: str,
    device: str,
    path: str,
    new_tokens: int,
    errors: Console,
) -> VerifyReport:
    known = ("patch", "sdpa", "flash")
    paths = known if path == "all" else (path,)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not set(paths) <= set(known):
        raise ValueError(f"--path must be one of {', '.join(known)} or all, got {path!r}")
    texts = _read_texts(batch) if batch is not None else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("loading torch and transformers", total=None)
        import torch

        from padless.checkpoint import encode_batch, load_llama, load_tokenizer
        from padless.demo import demo_texts, prepare_demo_model
        from padless.verification import verify

        quiet_transformers()
        check_device(device)
        name = None if model is None else model.resolve().name
        if model is None:
            progress.update(task, description=f"preparing {_DEMO_NAME} (once)")
            model, name = prepare_demo_model(), _DEMO_NAME
        progress.update(task, description=f"loading {name}")
        llama = load_llama(model, dtype=getattr(torch, dtype), device=device)
        tokenizer = load_tokenizer(model)
        if texts is None:
            texts = [demo_texts()[i] for i in _DEMO_TEXTS]
        encoded = encode_batch(tokenizer, texts, padding_side="right")

        def on_progress(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        return verify(
            llama,
            encoded,
            paths=paths,  # type: ignore[arg-type]
            new_tokens=new_tokens,
            name=f"{name} ({type(llama).__name__})",
            on_progress=on_progress,
        )


def _read_texts(file: Path) -> list[str]:
    texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in texts if line]
    if not texts:
        raise ValueError(f"--batch must hold at least one text, one a line, got none in {file}")
    return texts
