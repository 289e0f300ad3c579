"""What `bench` found, as data; how to print or draw it is somebody else's affair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from padless.verification import Check

FORMAT = 1


@dataclass(frozen=True)
class BenchRow:
    """One way to run the step.

    Attributes:
        name: "unpatched", "padless", or the peer's.
        reason: why there are no figures; None if there are.
        median_ms: of a step, and of a forward alone if that was asked for.
        p20_ms: a fifth of the steps were faster.
        p80_ms: a fifth of the steps were slower.
        tokens_per_s: real tokens of all its steps over the time of all of them.
        peak_bytes: most memory in tensors during a step, weights included; None on a CPU.
        speed_up: the unpatched model's median over this one.
        floor_share: the floor's time over the median; 1.0 is the floor.
        backends: of padless, that served attention.
        left_to_stock: calls that padless left to transformers' own path, by reason.
        samples_ms: every step, in order.
        rounds: the round of each sample: `BenchReport.lengths_a_round` has its lengths.
    """

    name: str
    reason: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    speed_up: float | None = None
    floor_share: float | None = None
    backends: tuple[str, ...] = ()
    left_to_stock: dict[str, int] | None = None
    samples_ms: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()


@dataclass(frozen=True)
class BenchReport:
    """A benchmark of one model on one machine.

    Attributes:
        model: what it is called.
        shape: sizes of the model.
        dtype: of its weights.
        attention: implementation of the unpatched model, as transformers names it.
        hardware: of the machine; `hardware["device"]` is its name for people.
        versions: of what took part.
        date: of the run, UTC.
        seed: of lengths, tokens and the order of turns.
        batch: rows of a step.
        seqlen: the longest that a row may be; each batch is padded to its longest row.
        lengths_from: the distribution's name, or "lengths" for the caller's own.
        is_fixed: whether all steps had one batch.
        is_forward_only: whether a step is the forward alone, without autograd.
        ceilings: what the device does at most, measured in the same run.
        floor_ms: median over the rounds of the work on real tokens at the measured ceiling.
        checks: of the verification; empty if it was not asked for or did not end.
        rows: unpatched, padless, then the peers; empty if the verification failed.
        lengths_a_round: real tokens of each row, for each round that was begun.
        is_interrupted: whether KeyboardInterrupt ended the run early.
        seconds: wall time in all.
    """

    model: str
    shape: dict[str, Any]
    dtype: str
    attention: str
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    date: str
    seed: int
    batch: int
    seqlen: int
    lengths_from: str
    is_fixed: bool
    is_forward_only: bool
    ceilings: dict[str, Any] | None
    floor_ms: float | None
    checks: tuple[Check, ...]
    rows: tuple[BenchRow, ...]
    lengths_a_round: tuple[tuple[int, ...], ...]
    is_interrupted: bool
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no check of the verification failed, and padless has figures or was cut short."""
        ours = self.row("padless")
        has_figures = ours is not None and ours.reason is None
        return all(check.passed for check in self.checks) and (has_figures or self.is_interrupted)

    @property
    def padding(self) -> float | None:
        """Share of padding in all slots of the timed batches; None if there was no round."""
        slots = sum(len(lengths) * max(lengths) for lengths in self.lengths_a_round)
        return 1 - sum(map(sum, self.lengths_a_round)) / slots if slots else None

    def row(self, name: str) -> BenchRow | None:
        """Finds a row by its name."""
        return next((row for row in self.rows if row.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything in types that JSON knows."""
        return {"format": FORMAT, "name": "bench", **asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BenchReport:
        """Makes the report again of what `as_dict` gave, also after a way through JSON.

        Raises:
            ValueError: the data is of another format.
        """
        if (data.get("name"), data.get("format")) != ("bench", FORMAT):
            raise ValueError(
                f"data must be a bench report of format {FORMAT}, got {data.get('name')!r} of "
                f"format {data.get('format')!r}"
            )
        entries = dict(data)
        for key in ("format", "name", "passed"):
            entries.pop(key, None)
        entries["checks"] = tuple(Check(**check) for check in data["checks"])
        entries["rows"] = tuple(BenchRow(**_with_tuples(row)) for row in data["rows"])
        entries["lengths_a_round"] = tuple(map(tuple, data["lengths_a_round"]))
        return cls(**entries)


def _with_tuples(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in entries.items()}
