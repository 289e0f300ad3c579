"""What an engagement changed, how to take it back, and what it did meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from padless.hf.changes import Change
from padless.llama.ledger import LayerRecord, ledger

Path = Literal["sdpa", "flash"]


@dataclass(frozen=True)
class EngagementReport:
    """What is patched, and what the patched layers did since.

    Attributes:
        path: "sdpa" (`forward_2`) or "flash" (`forward`).
        is_engaged: False after `undo()`.
        transformers: version.
        era: letter of its era.
        changes: dotted names of what was replaced.
        layers: a record for each layer that was called.
        computed_tokens: query tokens that attention computed, over all layers.
        batch_tokens: query tokens in the batches as they came, over all layers.
    """

    path: Path
    is_engaged: bool
    transformers: str
    era: str
    changes: tuple[str, ...]
    layers: tuple[LayerRecord, ...]
    computed_tokens: int
    batch_tokens: int

    def __str__(self) -> str:
        state = "engaged" if self.is_engaged else "undone"
        calls = sum(layer.calls for layer in self.layers)
        stock = sum(sum(layer.stock.values()) for layer in self.layers)
        backends = sorted({name for layer in self.layers for name in layer.backends})
        return (
            f"padless {state} on transformers {self.transformers} (era {self.era}), "
            f"{self.path} path: {len(self.layers)} layers, {calls} calls "
            f"({', '.join(backends) or 'none yet'}), {stock} left to the stock path, "
            f"{self.computed_tokens} of {self.batch_tokens} tokens computed"
        )


@dataclass
class Handle:
    """An engagement of the patch in this process; also a context manager.

    Attributes:
        path: "sdpa" (`forward_2`) or "flash" (`forward`).
        transformers: version.
        era: letter of its era.
        changes: everything that was replaced.
    """

    path: Path
    transformers: str
    era: str
    changes: tuple[Change, ...]
    on_undo: Callable[[], None] = field(repr=False)
    _is_engaged: bool = field(default=True, repr=False)

    def undo(self) -> None:
        """Puts everything back as it was; a second call does nothing."""
        if not self._is_engaged:
            return
        self._is_engaged = False
        for change in reversed(self.changes):
            change.revert()
        self.on_undo()

    def report(self) -> EngagementReport:
        """Tells what is patched and what the patched layers did since."""
        layers = tuple(ledger.records())
        return EngagementReport(
            path=self.path,
            is_engaged=self._is_engaged,
            transformers=self.transformers,
            era=self.era,
            changes=tuple(change.where for change in self.changes),
            layers=layers,
            computed_tokens=sum(layer.computed_tokens for layer in layers),
            batch_tokens=sum(layer.batch_tokens for layer in layers),
        )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()
