"""The result of the matrix as a rich table, as Markdown, and as one line of counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from .overlays import Era, MatrixError

BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
_OUTCOMES = ("passed", "failed", "skipped")
# In characters: a column's padding and border; the columns era, transformers and s, and the edge.
_BORDER = 3
_FIXED_WIDTH = 30


@dataclass
class Result:
    """What one version did.

    Attributes:
        era: the row.
        seconds: wall time of its tests.
        report: what `pytest --case-report` wrote; empty if it wrote nothing.
        problem: why the version counts as failed, or an empty string.
        tail: the end of its output, for a version that failed.
        absent: why it was not run on this machine, or an empty string; not a failure.
    """

    era: Era
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    tail: str = ""
    absent: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Tests passed, failed and skipped."""
        return {name: self.report.get("total", {}).get(name, 0) for name in _OUTCOMES}


@dataclass(frozen=True)
class Cell:
    """One case of one version: its text, its style in a terminal, the number of its footnote."""

    text: str
    style: str
    note: int | None = None

    @property
    def width(self) -> int:
        """Characters that the cell takes."""
        return len(self.text) + (len(_superscript(self.note)) if self.note else 0)

    def rich(self) -> str:
        """The cell as rich markup."""
        note = f"[dim]{_superscript(self.note)}[/dim]" if self.note else ""
        return f"[{self.style}]{self.text}[/{self.style}]{note}"

    def markdown(self) -> str:
        """The cell as Markdown."""
        text = f"**{self.text}**" if "FAIL" in self.text else self.text
        return f"{text}{_superscript(self.note)}" if self.note else text


class Grid:
    """Versions by cases, with one footnote per case for the reasons of its skipped tests."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results
        self.reasons: dict[str, dict[str, None]] = {}
        for result in results:
            for case, counts in result.report.get("cases", {}).items():
                self.reasons.setdefault(case, {}).update(dict.fromkeys(counts["reasons"]))
        self.cases = list(self.reasons)
        noted = [case for case in self.cases if self.reasons[case]]
        self.notes = {case: number for number, case in enumerate(noted, 1)}
        self.rows = [
            (result, [self._cell(result, case) for case in self.cases]) for result in results
        ]

    def _cell(self, result: Result, case: str) -> Cell:
        counts = result.report.get("cases", {}).get(case)
        if counts is None:
            return Cell("", "dim")
        note = self.notes[case] if counts["skipped"] else None
        if counts["failed"]:
            return Cell(f"FAIL {counts['failed']}", "bold red", note)
        if counts["passed"]:
            return Cell(f"ok {counts['passed']}", "green", note)
        return Cell("-", "dim", note)

    def footnotes(self) -> list[str]:
        """One line for each case that some version skipped and each version that was not run."""
        lines = [
            f"{_superscript(number)} {case}, skipped where {'; '.join(self.reasons[case])}"
            for case, number in self.notes.items()
        ]
        absent = (result for result in self.results if result.absent)
        return lines + [f"{it.era.transformers} not run: {it.absent}" for it in absent]

    def rich(self, width: int) -> list[Table]:
        """The table for a terminal, cut into as many as its width asks for."""
        tables, start, used = [], 0, _FIXED_WIDTH
        for index, case in enumerate(self.cases):
            column = _BORDER + max([len(case), *(cells[index].width for _, cells in self.rows)])
            if index > start and used + column > width:
                tables.append(self._table(start, index))
                start, used = index, _FIXED_WIDTH
            used += column
        return [*tables, self._table(start, len(self.cases))]

    def _table(self, start: int, stop: int) -> Table:
        table = Table()
        for head in ("era", "transformers", *self.cases[start:stop]):
            table.add_column(head, no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        for result, cells in self.rows:
            head = [result.era.letter, result.era.transformers]
            if result.problem:
                head[1] = f"[bold red]{head[1]}[/bold red]"
            if result.absent:
                head[1] = f"[dim]{head[1]}[/dim]"
            table.add_row(
                *head, *(cell.rich() for cell in cells[start:stop]), f"{result.seconds:.0f}"
            )
        return table

    def markdown(self) -> str:
        """The table and its footnotes for the documentation."""
        lines = [
            _markdown_row(["era", "transformers", *self.cases]),
            _markdown_row(["---"] * (2 + len(self.cases))),
        ]
        for result, cells in self.rows:
            name = result.era.transformers
            name = f"{name} **({result.problem})**" if result.problem else name
            texts = [cell.markdown() for cell in cells]
            lines.append(_markdown_row([result.era.letter, name, *texts]))
        if notes := self.footnotes():
            lines += ["", "  \n".join(notes)]
        return "\n".join(lines)


def totals(results: list[Result]) -> dict[str, int]:
    """Tests passed, failed and skipped over all versions.

    A version that failed without a failed test (it crashed, or collected none) counts as one.
    """
    total = dict.fromkeys(_OUTCOMES, 0)
    for result in results:
        counts = result.counts
        if result.problem and not counts["failed"]:
            counts["failed"] = 1
        for name in _OUTCOMES:
            total[name] += counts[name]
    return total


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the matrix markers of a file.

    Raises:
        MatrixError: the file is missing or lacks one of the markers.
    """
    old = path.read_text("utf-8") if path.exists() else ""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise MatrixError(f"{path.name} needs the lines {BEGIN} and {END} to hold the table")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
