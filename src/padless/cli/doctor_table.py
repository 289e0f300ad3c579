"""The report of `padless doctor` for people: tables that fit 80 columns, and one next step."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from padless.diagnosis.report import Choice, Diagnosis, Gpu

_STYLES = {
    "ok": "green",
    "accepted": "green",
    "tested": "green",
    "partly": "yellow",
    "newer": "yellow",
    "unmeasured": "yellow",
    "missing": "dim",
    "unfit": "dim",
}
_MEANS = {
    "ok": "ok",
    "accepted": "ok",
    "tested": "ok",
    "newer": "newer",
    "partly": "partly",
    "missing": "not here",
    "unfit": "no",
    "wrong": "WRONG",
    "broken": "BROKEN",
    "crashed": "CRASHES",
    "unmeasured": "open",
    "too old": "TOO OLD",
}
# Neither good nor bad: nobody knows.
_OPEN = "not measured yet"


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Prints the report.

    Args:
        found: what `doctor` returned.
        console: where to.
    """
    tables = {
        "This machine": _machine(found),
        f"Attention backends on {found.device}, fastest first": _backends(found),
        "What auto takes, heads/KV heads x head_dim; forward / training": _choices(found),
        "Environment": _variables(found),
    }
    for title, table in tables.items():
        if table.row_count:
            # Not the table's own title, which would be folded to the table's width.
            console.print(Text(title, style="bold"))
            console.print(table)
    open_ = sum(backend.unmeasured for backend in found.backends)
    if open_:
        total = len(found.backends) * len(found.choices)
        console.print(
            f"{open_} of {total} answers of backends are not measured yet: `padless doctor --all` "
            "measures them, and auto measures what it needs when it needs it."
        )
        console.print()
    for warning in found.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
        console.print()
    verdict = f"Attention runs here, on {found.device}." if found.ok else "Nothing can run here."
    if found.is_interrupted:
        verdict = "Interrupted: this is what was found until then."
    elif found.ok and (found.transformers.state != "ok" or found.transformers.support == "too old"):
        verdict = f"Attention runs here, on {found.device}, but there is no LLaMA to patch."
    is_good = found.ok and not found.is_interrupted
    console.print(Text(verdict, style="bold green" if is_good else "bold red"))
    console.print(Text.assemble(("Next: ", "bold"), found.next_step))


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        # The last one holds sentences and paths, which are folded and never cut.
        table.add_column(column, overflow="fold", no_wrap=number < len(columns) - 1)
    return table


def _status(status: str) -> Text:
    return Text(_MEANS[status], style=_STYLES.get(status, "bold red"))


def _machine(found: Diagnosis) -> Table:
    table = _table("what", "", "found")
    table.add_row("padless", "", f"{found.padless}, Python {found.python}, {found.platform}")
    torch = found.torch
    built_for = f"CUDA {torch.cuda}" if torch.cuda else f"HIP {torch.hip}" if torch.hip else "CPU"
    state = "missing" if torch.version is None else "broken" if torch.fault else "ok"
    said = torch.fault or (f"{torch.version}, built for {built_for}" if torch.version else "")
    table.add_row("torch", _status(state), Text(said))
    for gpu in found.gpus:
        table.add_row(
            f"cuda:{gpu.index}", _status("broken" if gpu.fault else "ok"), Text(_gpu(gpu))
        )
    if not found.gpus:
        table.add_row("GPU", _status("missing"), Text(torch.cuda_fault or "none"))
    if found.driver:
        table.add_row("driver", "", found.driver)
    transformers = found.transformers
    status = transformers.state if transformers.state != "ok" else transformers.support or "ok"
    if transformers.support == "too old":
        status = "too old"
    table.add_row("transformers", _status(status), Text(_transformers(found)))
    for package in found.packages:
        said = ": ".join(part for part in (package.version, package.fault) if part)
        table.add_row(package.name, _status(package.state), Text(said))
    table.add_row("cache", "", Text(found.cache))
    return table


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.capability:
        parts.append(f"compute capability {gpu.capability}")
    parts.append(f"{gpu.memory_bytes / 2**30:.0f} GiB")
    if gpu.fault:
        parts.append(gpu.fault)
    return ", ".join(parts)


def _transformers(found: Diagnosis) -> str:
    transformers = found.transformers
    if transformers.version is None:
        return transformers.fault
    parts = [transformers.version]
    if transformers.era:
        parts.append(f"era {transformers.era} ({transformers.change})")
    parts.append(f"tested: {' to '.join(transformers.tested)}")
    said = ", ".join(parts)
    return f"{said}: {transformers.fault}" if transformers.fault else said


def _backends(found: Diagnosis) -> Table:
    table = _table("name", "", "why not")
    for backend in found.backends:
        reasons = "\n".join(backend.reasons)
        if backend.status == "broken":
            # What its loader says is long, and stands above once.
            reasons = "its package does not import, see above"
        if backend.unmeasured:
            of = "" if backend.unmeasured == len(found.choices) else f", {backend.unmeasured} of "
            of += f"{len(found.choices)} usual requests" if of else ""
            reasons = "\n".join(filter(None, (reasons, f"{_OPEN}{of}")))
        table.add_row(backend.name, _status(backend.status), Text(reasons))
    if not found.backends:
        table.add_row("none", _status("broken"), Text(found.backends_fault or ""))
    return table


def _choices(found: Diagnosis) -> Table:
    table = _table("model")
    table.columns[0].no_wrap = True
    for dtype in dict.fromkeys(choice.dtype for choice in found.choices):
        table.add_column(dtype, overflow="fold")
    rows: dict[str, dict[str, list[Choice]]] = {}
    for choice in found.choices:
        sizes = f"{choice.num_heads}/{choice.num_kv_heads} x {choice.head_dim}"
        row = rows.setdefault(f"{choice.shape}, {sizes}", {})
        row.setdefault(choice.dtype, []).append(choice)
    for name, row in rows.items():
        table.add_row(name, *(_taken(choices) for choices in row.values()))
    return table


def _taken(choices: Iterable[Choice]) -> str:
    names = []
    for choice in choices:
        padded = choice.padded_head_dim not in (None, choice.head_dim)
        size = f" at {choice.padded_head_dim}" if padded else ""
        missing = _OPEN if choice.unmeasured else "none"
        names.append(f"{choice.backend or missing}{size}")
    return " / ".join(dict.fromkeys(names))


def _variables(found: Diagnosis) -> Table:
    table = _table("variable", "value")
    for name, value in found.variables.items():
        table.add_row(name, Text(value))
    return table
