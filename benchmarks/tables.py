"""Markdown tables of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import names
from benchmarks.markdown import (
    gib,
    name_cell,
    number,
    over,
    plain,
    reason_cells,
    titled,
    turns,
    write_table,
)
from benchmarks.results_folder import Json, device, median_ms, of_script
from benchmarks.tables_generation import write_generation
from benchmarks.tables_parallel import (
    write_balance,
    write_data_parallel,
    write_sequence_parallel,
)
from benchmarks.targets import Verdict, judge
from padless.benchmark.rows import headline


def sections(records: Sequence[Json]) -> dict[str, str]:
    """Makes what stands between the markers of docs/performance.md, by their names.

    Args:
        records: as `results_folder.load` gives them.
    """
    made = {"targets": _targets(judge(records))}
    for script, write in _SCRIPTS.items():
        blocks = [_block(record, write) for record in of_script(records, script)]
        command = f"python -m benchmarks.{script}"
        made[script] = "\n\n".join(blocks) if blocks else f"Not measured yet: `{command}`."
    return made


def hardware_line(record: Json) -> str:
    """Says in one line on what, with which versions, when and how a record was made."""
    hardware, versions, ceilings = record["hardware"], record["versions"], record["ceilings"]
    parts = [f"**{device(record)}**"]
    if hardware["kind"] == "cuda":
        parts.append(f"driver {hardware['driver']}, CUDA {hardware['cuda']}")
    else:
        parts.append(f"threads: {hardware['threads']}")
    shown = ("torch", "triton", "transformers", "flash-attn-4", "liger-kernel", "padless")
    parts.append(", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name)))
    parts.append(
        f"ceilings {number(ceilings['matmul_tflops'])} TFLOP/s ({ceilings['matmul_dtype']} "
        f"product), {number(ceilings['copy_tb_s'])} TB/s (copy)"
    )
    parts.append(f"{record['date']}, commit {record['commit'] or 'not known'}")
    return "; ".join(parts) + f". `{record['command']}`"


def _block(record: Json, write: Callable[[Json], str]) -> str:
    return f"{hardware_line(record)}\n\n{write(record)}"


def _targets(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "Nothing measured yet."
    lines = []
    for verdict in verdicts:
        state = {True: "met", False: "**not met**", None: "not measured"}[verdict.is_met]
        measured = "" if verdict.measured is None else _exact(verdict.measured)
        lines.append((verdict.key, verdict.measure, verdict.bound, measured, state, verdict.device))
    body = write_table(("", "measure", "target", "measured", "", "on"), lines)
    head, _, rest = body.partition("\n")
    _, _, rest = rest.partition("\n")
    return f"{head}\n| --- | --- | --- | --: | --- | --- |\n{rest}"


def _exact(value: float) -> str:
    if isinstance(value, int) or value == 0:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3f}"


def _step(record: Json) -> str:
    def write(table: Json) -> str:
        again = table["new_lengths"]
        floor = table.get("floor_ms")
        ours = median_ms(table, names.PADLESS)
        header = ["set-up", "ms", "20 to 80 %"]
        header += ["same lengths again, ms"] if again else []
        header += ["over the ceiling"] if floor else []
        header += ["over padless"]
        # Nobody counts it on a CPU.
        has_peak = any(row.get("peak_bytes") for row in table["rows"])
        header += ["peak GiB"] if has_peak else []
        lines = []
        for row in table["rows"]:
            if row["reason"] is not None:
                lines.append([name_cell(row), *reason_cells(row, len(header))])
                continue
            spread = row["forward_backward_ms"]
            cells = [
                name_cell(row),
                number(spread["median"]),
                f"{number(spread['p20'])} to {number(spread['p80'])}",
            ]
            if again:
                cells.append(number(row["again_ms"]["median"]))
            if floor:
                cells.append(number(spread["median"] / floor))
            cells.append(over(spread["median"], ours))
            lines.append([*cells, gib(row)] if has_peak else cells)
        return write_table(header, lines)

    return titled(record, write)


def _layer(record: Json) -> str:
    def write(table: Json) -> str:
        ours = median_ms(table, names.PADLESS)
        header = ("set-up", "forward ms", "forward + backward ms", "over padless", "peak GiB")
        lines = []
        for row in table["rows"]:
            if row["reason"] is not None:
                lines.append([name_cell(row), *reason_cells(row, len(header))])
                continue
            both = row["forward_backward_ms"]["median"]
            forward = number(row["forward_ms"]["median"])
            lines.append([name_cell(row), forward, number(both), over(both, ours), gib(row)])
        return write_table(header, lines)

    return titled(record, write)


def _lengths(record: Json) -> str:
    blocks = []
    for kind in ("one sequence", "packed documents"):
        tables = [table for table in record["tables"] if table["kind"] == kind]
        header = ["tokens", "turns", "padless ms", "floor ms", "padless over the floor"]
        header += ["padless peak GiB"]
        lines = []
        for table in tables:
            found = {row["name"]: row for row in table["rows"]}
            ours = median_ms(table, names.PADLESS)
            floors = [ms for name in names.FLOORS if (ms := median_ms(table, name)) is not None]
            if ours is None or not floors:
                reason = found[names.PADLESS]["reason"] or "no floor"
                lines.append([f"{table['tokens_real']:,}", reason, *[""] * (len(header) - 2)])
                continue
            compared = [found[name] for name in (names.PADLESS, *names.FLOORS) if name in found]
            cells = [turns(compared), number(ours), number(min(floors))]
            cells += [number(ours / min(floors)), gib(found[names.PADLESS])]
            lines.append([f"{table['tokens_real']:,}", *cells])
        blocks.append(f"*{kind}*\n\n{write_table(header, lines)}")
    return "\n\n".join(blocks)


def _kernels(record: Json) -> str:
    attention = [table for table in record["tables"] if table["flops"]]
    rotary = [table for table in record["tables"] if table["forward_bytes"]]
    rows = list(dict.fromkeys(row["name"] for table in attention for row in table["rows"]))
    header = ["heads/kv heads, sequence length", *rows]
    lines = []
    for table in attention:
        cells = [f"{table['num_heads']}/{table['num_kv_heads']}, {table['seqlen']}"]
        for row in table["rows"]:
            has = row["reason"] is None
            rates = (row["forward_tflops"], row["tflops"]) if has else ()
            cells.append(" / ".join(f"{rate:.0f}" for rate in rates) or "-")
        lines.append(cells)
    blocks = [
        "*attention: TFLOP/s, forward / forward + backward*\n\n" + write_table(header, lines),
        *_refusals(attention),
    ]
    for table in rotary:
        copy_ms = next((headline(row) for row in table["rows"] if "copy" in row["name"]), None)
        lines = []
        for row in table["rows"]:
            if row["reason"] is not None:
                lines.append([name_cell(row), *reason_cells(row, 4)])
                continue
            ms = row["forward_ms"]["median"]
            lines.append(
                [name_cell(row), number(ms), number(row["forward_gb_s"]), over(ms, copy_ms)]
            )
        body = write_table(("set-up", "forward ms", "GB/s", "over a copy"), lines)
        blocks.append(f"*{table['case']}*\n\n{body}")
    return "\n\n".join(blocks)


def _refusals(tables: Sequence[Json]) -> list[str]:
    """Says why rows have no figures, each reason once."""
    reasons = {row["name"]: row["reason"] for table in tables for row in table["rows"]}
    found = [f"- {name}: {plain(reason)}" for name, reason in reasons.items() if reason]
    return ["\n".join(found)] if found else []


def _syncs(record: Json) -> str:
    blocks = []
    for table in record["tables"]:
        shown = [key for key in _COUNTS if any(key in row for row in table["rows"])]
        header = ["set-up", *(key.replace("_", " ") for key in shown)]
        lines = [
            [name_cell(row), *reason_cells(row, len(header))]
            if row["reason"] is not None
            else [name_cell(row), *(str(row.get(key, "")) for key in shown)]
            for row in table["rows"]
        ]
        blocks.append(f"*{table['case']}*\n\n{write_table(header, lines)}")
    return "\n\n".join(blocks)


def _losscurve(record: Json) -> str:
    header = ["precision", "steps", "first loss", "last loss, as it is", "last loss, patched"]
    header += ["largest difference of the runs", "the precision's own"]
    header += ["mean difference on the same weights"]
    lines = []
    for table in record["tables"]:
        difference = table["difference"]
        if difference is None:
            reasons = [row["reason"] for row in table["rows"] if row["reason"]]
            lines.append([table["case"], plain(reasons[0]), *[""] * 6])
            continue
        stock, patched = (row["losses"] for row in table["rows"])
        same = difference["same_weights"]
        lines.append(
            [
                table["case"],
                str(table["steps"]),
                f"{stock[0]:.4f}",
                f"{stock[-1]:.5f}",
                f"{patched[-1]:.5f}",
                f"{difference['runs']['largest']:.1e}",
                _from_float32(record, stock),
                f"{same['mean']:+.1e} ± {same['standard_error']:.1e}",
            ]
        )
    model = {table["model"] for table in record["tables"]}
    return f"*{', '.join(sorted(model))}*\n\n{write_table(header, lines)}"


def _from_float32(record: Json, losses: Sequence[float]) -> str:
    """Says how far a curve is from the one of float32, both unpatched."""
    for table in record["tables"]:
        if table["case"] == "float32" and table["difference"] is not None:
            exact = table["rows"][0]["losses"]
            largest = max(abs(b - a) / a for a, b in zip(exact, losses, strict=True))
            return f"{largest:.1e}" if largest else ""
    return ""


_COUNTS = (
    "host_syncs_a_forward",
    "graph_breaks",
    "graphs_in_warmup",
    "recompilations_after_warmup",
)
_SCRIPTS: dict[str, Callable[[Json], str]] = {
    "step": _step,
    "generation": write_generation,
    "layer": _layer,
    "lengths": _lengths,
    "kernels": _kernels,
    "syncs": _syncs,
    "cpu_step": lambda record: _step(
        {**record, "tables": [{"new_lengths": False, **table} for table in record["tables"]]}
    ),
    "losscurve": _losscurve,
    "balance": write_balance,
    "data_parallel": write_data_parallel,
    "sequence_parallel": write_sequence_parallel,
}
