"""Rows of a table: what was timed of each variant, summed up and set beside the others."""

from __future__ import annotations

import statistics
from typing import Any

from padless.benchmark.variant import Timing


def rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Makes the rows of a table: figures or a reason, and the time over each other row's.

    Args:
        timings: of the variants.
    """
    made = []
    for timing in timings:
        row: dict[str, Any] = {"name": timing.name, "reason": timing.reason}
        if timing.reason is None:
            row.update({f"{key}_ms": spread(found) for key, found in timing.samples.items()})
            row["peak_bytes"] = timing.peak_bytes
            if "again" in timing.samples:
                pairs = zip(
                    timing.samples["forward_backward"], timing.samples["again"], strict=True
                )
                row["first_over_again"] = statistics.median(a / b for a, b in pairs)
        row.update(timing.facts)
        made.append(row)
    times = {row["name"]: headline(row) for row in made}
    for row in made:
        own = times[row["name"]]
        if own is not None:
            row["over"] = {
                name: own / other for name, other in times.items() if other and name != row["name"]
            }
    return made


def headline(row: dict[str, Any]) -> float | None:
    """Reads the milliseconds that a row is compared by: the median of all that it does, or None."""
    measures = ("forward_backward_ms", "forward_ms", "decode_ms")
    found = next((row[measure] for measure in measures if row.get(measure)), None)
    return float(found["median"]) if found else None


def spread(samples: list[float]) -> dict[str, float]:
    """Summarises milliseconds: median, 20th and 80th percentile, count."""
    ordered = sorted(samples)
    return {
        "median": statistics.median(ordered),
        "p20": _percentile(ordered, 0.2),
        "p80": _percentile(ordered, 0.8),
        "count": len(ordered),
    }


def _percentile(ordered: list[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
