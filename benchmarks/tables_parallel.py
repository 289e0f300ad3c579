"""Markdown tables of several ranks: balance, scaling, and sequences that they share."""

from __future__ import annotations

from benchmarks.markdown import name_cell, number, reason_cells, write_table
from benchmarks.results_folder import Json, median_ms


def write_balance(record: Json) -> str:
    """Writes a table for each set of lengths.

    Args:
        record: of `benchmarks.balance`.
    """
    header = ["batches by", "steps", "largest over mean cost", "in the worst step", "plan, s"]
    blocks = []
    for table in record["tables"]:
        lines = []
        for row in table["rows"]:
            if row["reason"] is not None:
                lines.append([name_cell(row), *reason_cells(row, len(header))])
                continue
            ratios = [f"{row[key]:.3f}" for key in ("imbalance", "worst")]
            cells = [name_cell(row), str(row["steps"]), *ratios, number(row["planned_s"])]
            lines.append(cells)
        title = (
            f"*{table['case']}: {table['samples']} samples, median {table['median']}, longest "
            f"{table['longest']} tokens; {table['ranks']} ranks, budget {table['max_tokens']}*"
        )
        blocks.append(f"{title}\n\n{write_table(header, lines)}")
    return "\n\n".join(blocks)


def write_data_parallel(record: Json) -> str:
    """Writes a table for each case.

    Args:
        record: of `benchmarks.data_parallel`.
    """
    header = ["batches by", "ranks", "ms a step", "real tokens a second", "efficiency"]
    blocks = []
    for table in record["tables"]:
        lines = [
            [
                name_cell(row),
                str(row["ranks"]),
                number(row["forward_backward_ms"]["median"]),
                number(row["tokens_a_second"]),
                f"{row['efficiency']:.3f}" if "efficiency" in row else "",
            ]
            for row in table["rows"]
        ]
        title = f"*{table['case']}; {table['max_tokens']} tokens a batch, {table['backend']}*"
        blocks.append(f"{title}\n\n{write_table(header, lines)}")
    return "\n\n".join(blocks)


def write_sequence_parallel(record: Json) -> str:
    """Writes a table for each length and kind of batch.

    Args:
        record: of `benchmarks.sequence_parallel`.
    """
    header = ["by", "ms", "efficiency", "communication hidden", "peak GiB a rank", "off by"]
    blocks = []
    for table in record["tables"]:
        lines = []
        for row in table["rows"]:
            if row["reason"] is not None:
                lines.append([name_cell(row), *reason_cells(row, len(header))])
                continue
            peak = row.get("peak_bytes")
            errors = row.get("relative_rms", {})
            hidden = row.get("timeline", {}).get("communication_hidden")
            lines.append(
                [
                    name_cell(row),
                    number(median_ms(table, row["name"]) or 0.0),
                    f"{row['efficiency']:.3f}" if "efficiency" in row else "",
                    f"{hidden:.0%}" if hidden is not None else "",
                    f"{peak / 2**30:.1f}" if peak else "",
                    f"{max(errors.values()):.1e}" if errors else "",
                ]
            )
        heads = f"{table['num_heads']}/{table['num_kv_heads']} heads of {table['head_dim']}"
        blocks.append(
            f"*{table['case']}; {heads}, {table['dtype']}*\n\n{write_table(header, lines)}"
        )
    return "\n\n".join(blocks)
