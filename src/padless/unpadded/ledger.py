"""What a patch did so far: counts for `handle.report()`, which nothing that computes reads."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from typing import Any

from padless.answers import Candidate
from padless.unpadded.batch import FlatBatch
from padless.unpadded.sharding import SequenceParallel

_logger = logging.getLogger("padless")
_numbers = itertools.count()


class Ledger:
    """Counts of one patch, and the backend it was asked for.

    A copy of a patched model gets a fresh one of the same patch; a pickled model gets none, and is
    an unpatched one.

    Args:
        backend: of `varlen_attention`, or "auto".
        number: of the patch, by which its forwards know it; default: a new one.
        sequence: who shares its sequences; None if nobody does.
    """

    def __init__(
        self, backend: str, number: int | None = None, sequence: SequenceParallel | None = None
    ) -> None:
        self.backend = backend
        self.sequence = sequence
        self.number = next(_numbers) if number is None else number
        self.handle: Any = None
        self.forwards = 0
        self.compiled_forwards = 0
        self.computed_tokens = 0
        self.batch_tokens = 0
        self.host_syncs = 0
        self.stock: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.shared: Counter[str] = Counter()
        # Why generate is left alone altogether.
        self.generation_fault: str | None = None
        self.generations = 0
        self.decoding_steps = 0
        self.decoding_backends: Counter[str] = Counter()
        self.graph_replays = 0
        self.rows_left_out = 0
        self.generation_notes: Counter[str] = Counter()
        self.layers: dict[str, Counter[str]] = {}
        self.traces: dict[str, tuple[Candidate, ...]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        made = Ledger(self.backend, self.number, self.sequence)
        made.generation_fault = self.generation_fault
        return memo.setdefault(id(self), made)

    def __reduce__(self) -> Any:
        # Pickled methods are the class's own when they come back, without a patch: so is the rest.
        return type(None), ()

    def count(self, batch: FlatBatch) -> None:
        """Counts a forward that ran flat."""
        with self._lock:
            self.forwards += 1
            computed = batch.position_ids.shape[1]
            self.computed_tokens += computed
            # What other ranks compute is no padding.
            self.batch_tokens += batch.layout.padded_total - batch.layout.total + computed
            self.host_syncs += batch.host_syncs
            if batch.shard is not None:
                self.shared[batch.shard.algorithm] += 1
            for index, served in enumerate(batch.served.values()):
                number = index if served.layer_idx is None else served.layer_idx
                name = f"{served.layer}[{number}]"
                self.layers.setdefault(name, Counter())[served.selection.name] += 1
                self.traces[served.selection.name] = served.selection.trace
            if not batch.served:
                self.compiled_forwards += 1

    def count_syncs(self, host_syncs: int) -> None:
        """Counts host synchronisations of a batch that was left to the stock path after them."""
        with self._lock:
            self.host_syncs += host_syncs

    def count_stock(self, reason: str, *, is_usual: bool) -> None:
        """Counts a call left to the stock path, and says so the first time."""
        with self._lock:
            self.stock[reason] += 1
            is_first = self.stock[reason] == 1
        if is_first:
            level = logging.INFO if is_usual else logging.WARNING
            _logger.log(level, "%s takes transformers' own path, padding and all", reason)

    def count_whole(self, reason: str) -> None:
        """Counts a call that every rank of a sequence group computes as a whole."""
        with self._lock:
            self.whole[reason] += 1
            is_first = self.whole[reason] == 1
        if is_first:
            _logger.warning("%s is not shared out: every rank computes the whole of it", reason)

    def count_generation(self, backend: str, *, steps: int, replays: int, left_out: int) -> None:
        """Counts a `generate` call whose prompt and steps ran on real tokens only."""
        with self._lock:
            self.generations += 1
            self.decoding_steps += steps
            if steps:
                self.decoding_backends[backend] += steps
            self.graph_replays += replays
            self.rows_left_out += left_out

    def note_generation(self, reason: str) -> None:
        """Counts why a `generate` call, or a part of it, did without; says so the first time."""
        with self._lock:
            self.generation_notes[reason] += 1
            is_first = self.generation_notes[reason] == 1
        if is_first:
            _logger.info("generate: %s", reason)
