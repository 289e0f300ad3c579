"""What the patched layers did: calls, backends and tokens of each, for `handle.report()`.

Counts only. Nothing that a forward computes reads them.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

_logger = logging.getLogger("padless")


@dataclass
class LayerRecord:
    """Counts of one attention layer.

    Attributes:
        name: class and layer index.
        calls: forwards served by padless.
        backends: calls by backend.
        computed_tokens: query tokens that attention computed.
        batch_tokens: query tokens in the batches as they came, padding included.
        stock: calls left to the stock path, by reason.
    """

    name: str
    calls: int = 0
    backends: Counter[str] = field(default_factory=Counter)
    computed_tokens: int = 0
    batch_tokens: int = 0
    stock: Counter[str] = field(default_factory=Counter)


class Ledger:
    """The records of every layer that was called, while the layer lives."""

    def __init__(self) -> None:
        self._records: weakref.WeakKeyDictionary[nn.Module, LayerRecord] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def count(
        self, module: nn.Module, backend: str, *, computed_tokens: int, batch_tokens: int
    ) -> None:
        """Counts a call that padless served."""
        with self._lock:
            record = self._record(module)
            record.calls += 1
            record.backends[backend] += 1
            record.computed_tokens += computed_tokens
            record.batch_tokens += batch_tokens

    def count_stock(self, module: nn.Module, reason: str) -> None:
        """Counts a call left to the stock path, and says so the first time."""
        with self._lock:
            self._record(module).stock[reason] += 1
        self.say_once(f"{reason} is left to transformers' own attention")

    def say_once(self, message: str) -> None:
        """Logs a warning the first time it comes."""
        if message not in self._said:
            self._said.add(message)
            _logger.warning("%s", message)

    def records(self) -> list[LayerRecord]:
        """Returns the records in the order in which the layers were first called."""
        with self._lock:
            return list(self._records.values())

    def clear(self) -> None:
        """Forgets all counts."""
        self.exchange(weakref.WeakKeyDictionary())
        self._said.clear()

    def exchange(
        self, records: weakref.WeakKeyDictionary[nn.Module, LayerRecord]
    ) -> weakref.WeakKeyDictionary[nn.Module, LayerRecord]:
        """Puts other records in place and returns those that stood there."""
        with self._lock:
            self._records, kept = records, self._records
            return kept

    def _record(self, module: nn.Module) -> LayerRecord:
        if module not in self._records:
            index = getattr(module, "layer_idx", None)
            suffix = "" if index is None else f"[{index}]"
            self._records[module] = LayerRecord(f"{type(module).__name__}{suffix}")
        return self._records[module]


# One for the process, as the patch is one for the process.
ledger = Ledger()
