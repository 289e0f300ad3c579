"""What the project set out to reach, and whether the records show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from benchmarks import names
from benchmarks.results_folder import (
    Json,
    device,
    least_ms,
    median_ms,
    of_script,
    ratio,
    row,
    tables_with,
)

_LIGER = names.with_liger
_PEERS = (names.EAGER, names.SDPA, names.FA4, names.FA4_BY_HAND)


class Verdict(NamedTuple):
    """One target on one device.

    Attributes:
        key: of the target.
        measure: what is compared, and where.
        bound: what it has to be.
        measured: what it is; None if the record does not have it.
        is_met: whether that is good enough; None if it was not measured.
        device: where.
    """

    key: str
    measure: str
    bound: str
    measured: float | None
    is_met: bool | None
    device: str


class _Finding(NamedTuple):
    key: str
    measure: str
    measured: float | None
    at_most: float | None = None
    at_least: float | None = None


def judge(records: Iterable[Json]) -> list[Verdict]:
    """Compares every record with the targets that it says something about, in their order.

    Args:
        records: as `results_folder.load` gives them.
    """
    records = list(records)
    verdicts = [
        _verdict(finding, device(record))
        for script, find in _SCRIPTS.items()
        for record in of_script(records, script)
        for finding in find(record)
    ]
    return sorted(verdicts, key=lambda v: (_order(v.key), v.device))


def _order(key: str) -> int:
    digits = "".join(letter for letter in key if letter.isdigit())
    return int(digits) if digits else 99


def _verdict(finding: _Finding, device_name: str) -> Verdict:
    value = finding.measured
    is_met: bool | None = None
    if finding.at_most is not None:
        bound = f"at most {finding.at_most:g}"
        is_met = None if value is None else value <= finding.at_most
    else:
        assert finding.at_least is not None
        bound = f"at least {finding.at_least:g}"
        is_met = None if value is None else value >= finding.at_least
    return Verdict(finding.key, finding.measure, bound, value, is_met, device_name)


def _layer(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        case = table["case"]
        ours, floor = median_ms(table, names.PADLESS), least_ms(table, names.FLOORS)
        yield _Finding("P1", f"layer over the floor; {case}", _divide(ours, floor), at_most=1.05)
    for table in record["tables"]:
        if not table["case"].startswith("MHA"):
            continue  # the original has no grouped heads
        bound = 1.25 if "all real" in table["case"] else 3.0
        best = least_ms(table, (names.ORIGINAL_FLASH, names.ORIGINAL_SDPA))
        ours = median_ms(table, names.PADLESS)
        if bound == 3.0 and "47 %" not in table["case"]:
            continue
        yield _Finding(
            "P2",
            f"layer, the original's better path over ours; {table['case']}",
            _divide(best, ours),
            at_least=bound,
        )


def _step(record: Json) -> Iterator[_Finding]:
    liger = _LIGER(names.PADLESS)
    for table in tables_with(record, "% real"):
        if table["new_lengths"]:
            continue
        case = table["case"]
        over = ratio(table, names.PADLESS, names.FA4_BY_HAND)
        yield _Finding("P3", f"step over {names.FA4_BY_HAND}; {case}", over, at_most=1.0)
        over = ratio(table, liger, _LIGER(names.FA4_BY_HAND))
        yield _Finding("P4", f"the same, Liger on both sides; {case}", over, at_most=1.0)
    for table in tables_with(record, "47 % real"):
        if table["new_lengths"]:
            continue
        over = ratio(table, liger, _LIGER(names.FA4_BY_HAND))
        yield _Finding("P4", "the same, the record to go for", over, at_most=0.93)
        over = ratio(table, names.SDPA, names.PADLESS)
        yield _Finding("P5", "transformers' default over ours", over, at_least=2.3)
        over = ratio(table, names.SDPA, liger)
        yield _Finding("P5", "transformers' default over ours with Liger", over, at_least=2.8)
        over = ratio(table, names.SDPA, names.PADLESS_TORCH)
        yield _Finding("P6", "transformers' default over ours on torch alone", over, at_least=1.8)
    for table in tables_with(record, "all real"):
        for twin, label in ((str, "no Liger"), (_LIGER, "Liger on both sides")):
            best = least_ms(table, map(twin, _PEERS))
            over = _divide(median_ms(table, twin(names.PADLESS)), best)
            measure = f"all real, ours over transformers' best; {label}"
            yield _Finding("P11", measure, over, at_most=1.0)
    for table in tables_with(record, "new lengths"):
        for name in (names.PADLESS, liger):
            found = row(table, name) or {}
            measure = f"{name}, new lengths over the same ones again"
            yield _Finding("P12", measure, found.get("first_over_again"), at_most=1.03)
        over = ratio(table, names.SDPA, names.PADLESS)
        measure = "new lengths at every step, transformers' default over ours"
        yield _Finding("P12", measure, over, at_least=3.0)


def _generation(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        if table["key"] not in ("p7", "p7-fixed"):
            continue
        case = "new lengths" if table["new_lengths"] else "one shape"
        ours = median_ms(table, names.PADLESS, "decode_ms")
        floor = _divide(ours, table["decode_floor_ms"])
        yield _Finding("P7", f"a decoded token over the floor; {case}", floor, at_most=2.2)
        yield _Finding("P7", f"the same, the record to go for; {case}", floor, at_most=1.9)
        first = _over_peers(table, "prefill_ms")
        yield _Finding("P7", f"first token over the best peer's; {case}", first, at_most=1.0)
        if not table["new_lengths"]:
            continue
        for name, bound in ((names.SDPA_NO_CUDNN, 3.5), (names.SDPA, 18.0)):
            times = ratio(table, name, names.PADLESS, "decode_ms")
            measure = f"a decoded token, {name} over ours; {case}"
            yield _Finding("P7", measure, times, at_least=bound)
    for measure, what in (("prefill_ms", "first token"), ("decode_ms", "a decoded token")):
        found = (_over_peers(table, measure) for table in record["tables"])
        worst = max((over for over in found if over is not None), default=None)
        text = f"{what} over the best peer's; largest of all batches"
        yield _Finding("P7", text, worst, at_most=1.0)


def _over_peers(table: Json, measure: str) -> float | None:
    best = least_ms(table, names.GENERATION_PEERS, measure)
    return _divide(median_ms(table, names.PADLESS, measure), best)


def _syncs(record: Json) -> Iterator[_Finding]:
    for table in tables_with(record, "host synchronisations"):
        found = row(table, names.PADLESS) or {}
        count = found.get("host_syncs_a_forward")
        yield _Finding("P8", "host synchronisations a forward", count, at_most=1)
    for table in tables_with(record, "torch.compile"):
        found = row(table, names.PADLESS) or {}
        breaks = found.get("graph_breaks")
        yield _Finding("P8", "graph breaks inside decoder layers", breaks, at_most=0)
        count = found.get("recompilations_after_warmup")
        measure = f"recompilations after warm-up over {table['shapes']} shapes"
        yield _Finding("P8", measure, count, at_most=0)


def _lengths(record: Json) -> Iterator[_Finding]:
    for kind in ("one sequence", "packed documents"):
        tables = sorted(tables_with(record, kind), key=lambda table: table["tokens_real"])
        if not tables:
            continue
        worst: float | None = None
        for table in tables:
            over = _divide(median_ms(table, names.PADLESS), least_ms(table, names.FLOORS))
            if over is not None:
                worst = max(over, worst or 0.0)
        span = f"{tables[0]['tokens_real']} to {tables[-1]['tokens_real']} tokens, {kind}"
        yield _Finding("P9", f"largest time over the floor; {span}", worst, at_most=1.05)
        measure = f"memory a token, last doubling over all before; {kind}"
        yield _Finding("P9", measure, _steepening(tables), at_most=1.05)


def _steepening(tables: list[Json]) -> float | None:
    """Compares the growth of memory over the last doubling with that before: 1 is linear."""
    points = []
    for table in tables:
        found = row(table, names.PADLESS)
        if found and found.get("peak_bytes"):
            points.append((table["tokens_real"], found["peak_bytes"]))
    if len(points) < 3:
        return None
    (first, low), (middle, mid), (last, high) = points[0], points[-2], points[-1]
    return ((high - mid) / (last - middle)) / ((mid - low) / (middle - first))


def _cpu_step(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        over = ratio(table, names.SDPA, names.PADLESS)
        measure = f"CPU, float32, unpatched step over ours; {table['case']}"
        yield _Finding("P10", measure, over, at_least=1.7)


def _losscurve(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        difference, steps = table["difference"], table["steps"]
        if table["case"] == "float32":
            value = difference and difference["runs"]["largest"]
            measure = f"loss curve of {steps} steps, largest relative difference; float32"
            yield _Finding("curve", measure, value, at_most=1e-4)
        else:
            same = difference and difference["same_weights"]
            value = same and abs(same["mean"]) / same["standard_error"]
            measure = f"loss on the same weights, {steps} steps, mean difference in standard errors"
            yield _Finding("curve", f"{measure}; {table['case']}", value, at_most=3.0)


def _balance(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        found = row(table, names.BALANCED)
        measure = f"largest over mean cost of {table['ranks']} ranks; {table['case']}"
        yield _Finding("balance", measure, found["imbalance"] if found else None, at_most=1.05)


def _data_parallel(record: Json) -> Iterator[_Finding]:
    for table in record["tables"]:
        found = row(table, names.BALANCED)
        measure = f"data parallel, efficiency of {table['ranks']} ranks; {table['case']}"
        yield _Finding("balance", measure, found["efficiency"] if found else None, at_least=0.95)


def _sequence_parallel(record: Json) -> Iterator[_Finding]:
    """Judges the better of the two algorithms on two GPUs; between the lengths nothing is asked."""
    asked = {32768: 0.95, 131072: 0.98}
    for table in record["tables"]:
        if table["ranks"] != 2 or table["tokens_real"] not in asked:
            continue
        rows = (row(table, name) for name in (names.ULYSSES, names.RING))
        found = [each["efficiency"] for each in rows if each and "efficiency" in each]
        measure = f"sequence parallel, efficiency; {table['case']}"
        at_least = asked[table["tokens_real"]]
        yield _Finding("P13", measure, max(found, default=None), at_least=at_least)


def _divide(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


_SCRIPTS: dict[str, Callable[[Json], Iterator[_Finding]]] = {
    "layer": _layer,
    "step": _step,
    "generation": _generation,
    "syncs": _syncs,
    "lengths": _lengths,
    "cpu_step": _cpu_step,
    "losscurve": _losscurve,
    "balance": _balance,
    "data_parallel": _data_parallel,
    "sequence_parallel": _sequence_parallel,
}
