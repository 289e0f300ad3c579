"""Parts of a table in Markdown: numbers, cells, titles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.results_folder import Json


def number(value: float) -> str:
    """Writes a number with three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def write_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Writes a table, names to the left and figures to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    rows = [header, rule, *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def titled(record: Json, write: Callable[[Json], str]) -> str:
    """Writes a record's tables, each below its title."""
    return "\n\n".join(f"*{title(table)}*\n\n{write(table)}" for table in record["tables"])


def title(table: Json) -> str:
    """Says what a table measures, and on how much."""
    text = str(table["case"])
    if table.get("tokens_real") and table.get("tokens_padded") != table.get("tokens_real"):
        text += f": {table['tokens_real']} of {table['tokens_padded']} tokens are real"
    if table.get("floor_ms"):
        work = f"{number(table['flops'] / 1e12)} TFLOP"
        text += f"; {work} take {number(table['floor_ms'])} ms at the ceiling"
    if "measured" in table:
        # Of another run than the record's.
        text += f"; measured apart, commit {table['measured']['commit'] or 'not known'}"
    counts = turns(table["rows"])
    return f"{text}; turns a row: {counts}" if counts else text


def turns(rows: Iterable[Json]) -> str:
    """Writes how many turns are behind rows' medians; nothing where nobody counted them."""
    counts = [
        figure["count"]
        for row in rows
        for figure in row.values()
        if isinstance(figure, dict) and "count" in figure
    ]
    if not counts:
        return ""
    fewest, most = min(counts), max(counts)
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def name_cell(row: Json) -> str:
    """Writes a row's name; ours stand out."""
    name = str(row["name"])
    return f"**{name}**" if name.startswith("padless") else name


def reason_cells(row: Json, columns: int) -> list[str]:
    """Fills a row without figures, behind its name."""
    return [plain(row["reason"]), *[""] * (columns - 2)]


def plain(reason: str) -> str:
    """Shortens an error to what a reader of a table needs."""
    text = reason.replace("|", "/")
    return text if len(text) <= 90 else text[:87] + "..."


def over(ms: float, other: float | None) -> str:
    """Writes how many times as long one takes as another."""
    return number(ms / other) if other else ""


def gib(row: Json, key: str = "peak_bytes") -> str:
    """Writes a row's memory; nothing where nobody counted it."""
    found = row.get(key)
    return f"{found / 2**30:.1f}" if found else ""
