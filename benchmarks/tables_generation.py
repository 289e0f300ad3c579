"""Markdown tables of generation."""

from __future__ import annotations

from benchmarks import names
from benchmarks.markdown import (
    gib,
    name_cell,
    number,
    over,
    reason_cells,
    title,
    write_table,
)
from benchmarks.results_folder import Json, median_ms


def write_generation(record: Json) -> str:
    """Writes a table for each case.

    Args:
        record: of `benchmarks.generation`.
    """
    return "\n\n".join(
        "\n\n".join((f"*{_title(table)}*", _table(table), *_notes(table)))
        for table in record["tables"]
    )


def _title(table: Json) -> str:
    cache = (number(table[key] / 2**30) for key in ("cache_bytes_real", "cache_bytes_padded"))
    return (
        f"{title(table)}; {table['tokens']} tokens behind the first; reading the weights takes "
        f"{number(table['decode_floor_ms'])} ms; keys and values of all {next(cache)} GiB, with "
        f"padding {next(cache)} GiB"
    )


def _table(table: Json) -> str:
    header = ["set-up", "first token, ms", "over padless", "ms a token", "20 to 80 %"]
    header += ["over the floor", "over padless", "same first tokens"]
    has_peak = any(row.get("over_weights_bytes") for row in table["rows"])
    header += ["GiB over the weights"] if has_peak else []
    first_of_ours = median_ms(table, names.PADLESS, "prefill_ms")
    ours = median_ms(table, names.PADLESS, "decode_ms")
    lines = []
    for row in table["rows"]:
        if row["reason"] is not None:
            lines.append([name_cell(row), *reason_cells(row, len(header))])
            continue
        first, spread = row["prefill_ms"]["median"], row["decode_ms"]
        same = row.get("same_first_tokens")
        cells = [
            name_cell(row),
            number(first),
            over(first, first_of_ours),
            number(spread["median"]),
            f"{number(spread['p20'])} to {number(spread['p80'])}",
            number(spread["median"] / table["decode_floor_ms"]),
            over(spread["median"], ours),
            "" if same is None else f"{100 * same:.0f} %",
        ]
        lines.append([*cells, gib(row, "over_weights_bytes")] if has_peak else cells)
    return write_table(header, lines)


def _notes(table: Json) -> list[str]:
    """Says which rows of ours left something to transformers."""
    notes = [
        f"- {row['name']}: {count} forwards of the first turn left to transformers: {reason}"
        for row in table["rows"]
        for reason, count in row.get("left_to_transformers", {}).items()
    ]
    return ["\n".join(notes)] if notes else []
