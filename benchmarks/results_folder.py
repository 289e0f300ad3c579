"""Reads records: which there are, their tables, rows and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def load(folder: Path) -> list[Json]:
    """Loads the records of a folder, sorted by script and device; smoke runs do not count.

    Args:
        folder: holds one JSON file a record.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    kept = [record for record in found if not record["smoke"]]
    return sorted(kept, key=lambda record: (record["name"], device(record)))


def of_script(records: Iterable[Json], name: str) -> list[Json]:
    """Picks the records of a script."""
    return [record for record in records if record["name"] == name]


def device(record: Json) -> str:
    """Names the device that a record was measured on."""
    return str(record["hardware"]["device"])


def row(table: Json, name: str) -> Json | None:
    """Finds a row that has figures."""
    for found in table["rows"]:
        if found["name"] == name and found["reason"] is None:
            return dict(found)
    return None


def median_ms(table: Json, name: str, measure: str = "forward_backward_ms") -> float | None:
    """Reads a row's median; None if there is no such row or no such figure."""
    found = row(table, name)
    return float(found[measure]["median"]) if found and measure in found else None


def ratio(table: Json, name: str, over: str, measure: str = "forward_backward_ms") -> float | None:
    """Reads how many times as long one row takes as another; None if either has no figures."""
    one, other = median_ms(table, name, measure), median_ms(table, over, measure)
    return one / other if one is not None and other is not None else None


def least_ms(
    table: Json, candidates: Iterable[str], measure: str = "forward_backward_ms"
) -> float | None:
    """Reads the shortest of several rows' medians; None if none of them has figures."""
    found = [ms for name in candidates if (ms := median_ms(table, name, measure)) is not None]
    return min(found, default=None)


def tables_with(record: Json, text: str) -> Iterator[Json]:
    """Finds the tables of a record whose case has a text in its name."""
    for table in record["tables"]:
        if text in table["case"]:
            yield table
