"""What a patch changed, how to take it back, and what it did meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from padless.answers import Candidate
from padless.unpadded.ledger import Ledger


@dataclass(frozen=True)
class LayerReport:
    """What one attention layer ran on.

    Attributes:
        name: class and index.
        backends: forwards by backend.
    """

    name: str
    backends: dict[str, int]


@dataclass(frozen=True)
class PatchReport:
    """What is patched, and what it did since.

    Attributes:
        is_engaged: False after `undo()`.
        transformers: version.
        era: letter of its era.
        changes: dotted names of what was replaced.
        forwards: calls that ran on real tokens only.
        compiled_forwards: those of them whose layers torch.compile ran, which do not count here.
        layers: each layer that attended, with its backends.
        passed_over: for each backend that served, those that were asked before it and why they
            did not.
        computed_tokens: tokens that the model computed.
        skipped_tokens: padding that it did not compute.
        host_syncs: host synchronisations, at most one a forward.
        stock: calls left to transformers' own path, by reason.
        sequence_parallel: the algorithm that was asked for, and the ranks that share each sequence;
            None if nobody does.
        shared: forwards that ranks shared, by the algorithm that was taken.
        whole: calls that every rank computed as a whole, by reason.
        generations: `generate` calls that kept a cache of real tokens alone.
        decoding_steps: further tokens, one for each row, that such calls computed behind it.
        decoding_backends: such steps by the backend that attended.
        graph_replays: those of the steps that were a replay of a CUDA graph.
        rows_left_out: rows of such calls that had ended and that their last steps did not compute.
        generation_notes: why `generate` calls, or their steps, did without, by reason.
    """

    is_engaged: bool
    transformers: str
    era: str
    changes: tuple[str, ...]
    forwards: int
    compiled_forwards: int
    layers: tuple[LayerReport, ...]
    passed_over: dict[str, tuple[Candidate, ...]]
    computed_tokens: int
    skipped_tokens: int
    host_syncs: int
    stock: dict[str, int]
    sequence_parallel: str | None = None
    shared: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    generations: int = 0
    decoding_steps: int = 0
    decoding_backends: dict[str, int] = field(default_factory=dict)
    graph_replays: int = 0
    rows_left_out: int = 0
    generation_notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        state = "engaged" if self.is_engaged else "undone"
        backends = sorted({name for layer in self.layers for name in layer.backends})
        lines = [
            f"padless {state} on transformers {self.transformers} (era {self.era}): "
            f"{self.forwards} forwards on real tokens, {len(self.layers)} layers "
            f"({', '.join(backends) or 'none yet'}), {self.computed_tokens} tokens computed, "
            f"{self.skipped_tokens} skipped, {self.host_syncs} host synchronisations"
        ]
        for served in backends:
            lines += [
                f"  before {served}: {c.name} was passed over: {c.rejected}"
                for c in self.passed_over.get(served, ())
            ]
        lines += [
            f"  {count} left to transformers' own path: {reason}"
            for reason, count in self.stock.items()
        ]
        if self.sequence_parallel:
            counts = [f"{n} forwards by {name}" for name, n in sorted(self.shared.items())]
            lines.append(
                f"  sequences shared out by {self.sequence_parallel}: "
                f"{', '.join(counts) or 'none yet'}"
            )
        lines += [f"  {n} not shared out: {reason}" for reason, n in self.whole.items()]
        if self.generations:
            lines.append(
                f"  {self.generations} generate calls with a cache of real tokens: "
                f"{self.decoding_steps} decoding steps "
                f"({', '.join(self.decoding_backends) or 'none yet'}), "
                f"{self.graph_replays} by a CUDA graph"
            )
            if self.rows_left_out:
                lines.append(f"  {self.rows_left_out} rows were left out of steps behind their end")
        lines += [f"  {n} generate: {reason}" for reason, n in self.generation_notes.items()]
        return "\n".join(lines)


@dataclass
class PatchHandle:
    """A patch of one model, or of every LLaMA of the process; also a context manager.

    Attributes:
        transformers: version.
        era: letter of its era.
        changes: everything that was replaced.
    """

    transformers: str
    era: str
    changes: tuple[Any, ...]
    ledger: Ledger = field(repr=False)
    on_undo: Callable[[], None] = field(repr=False)
    _is_engaged: bool = field(default=True, repr=False)

    @property
    def is_engaged(self) -> bool:
        """Whether the patch is in force."""
        return self._is_engaged

    def undo(self) -> None:
        """Puts everything back as it was; a second call does nothing."""
        if not self._is_engaged:
            return
        self._is_engaged = False
        for change in reversed(self.changes):
            change.revert()
        self.on_undo()

    def report(self) -> PatchReport:
        """Tells what is patched and what it did since."""
        ledger = self.ledger
        return PatchReport(
            is_engaged=self._is_engaged,
            transformers=self.transformers,
            era=self.era,
            changes=tuple(change.where for change in self.changes),
            forwards=ledger.forwards,
            compiled_forwards=ledger.compiled_forwards,
            layers=tuple(LayerReport(name, dict(counts)) for name, counts in ledger.layers.items()),
            passed_over={
                name: tuple(c for c in trace if c.rejected) for name, trace in ledger.traces.items()
            },
            computed_tokens=ledger.computed_tokens,
            skipped_tokens=ledger.batch_tokens - ledger.computed_tokens,
            host_syncs=ledger.host_syncs,
            stock=dict(ledger.stock),
            sequence_parallel=str(ledger.sequence) if ledger.sequence is not None else None,
            shared=dict(ledger.shared),
            whole=dict(ledger.whole),
            generations=ledger.generations,
            decoding_steps=ledger.decoding_steps,
            decoding_backends=dict(ledger.decoding_backends),
            graph_replays=ledger.graph_replays,
            rows_left_out=ledger.rows_left_out,
            generation_notes=dict(ledger.generation_notes),
        )

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()
