"""Which plots there are for which records, and the names of their files."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.plots_parallel import has_timeline
from benchmarks.results_folder import Json, device
from padless.benchmark.names import slug

_TITLES = {
    "step": "A training step",
    "generation": "Batched generation",
    "layer": "One attention layer",
    "lengths": "From 2k to 128k tokens",
    "kernels": "Attention kernels",
    "cpu_step": "A training step on the CPU",
    "losscurve": "Loss of a real model, patched and unpatched",
    "sequence_parallel": "Computation and communication of one turn",
}


def file_name(record: Json) -> str | None:
    """Names a record's plot; None if it has none."""
    name = record["name"]
    if name == "sequence_parallel" and not has_timeline(record):
        return None
    return f"{name}-{slug(device(record))}.png" if name in _TITLES else None


def images(records: Sequence[Json]) -> dict[str, list[tuple[str, str]]]:
    """Lists the plots by section: titles and files.

    Args:
        records: as `results_folder.load` gives them.
    """
    made: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        file = file_name(record)
        if file is not None:
            title = f"{_TITLES[record['name']]}, {device(record)}"
            made.setdefault(record["name"], []).append((title, file))
    return made
