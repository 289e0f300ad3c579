"""CUDA graphs planted on the CPU: what a session does with one, without what it computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from padless.generation import runner
from padless.generation import store as stores
from padless.unpadded import session

Step = Callable[[Tensor, Tensor], Tensor]


class StandIn:
    """Runs the step at every replay, on tensors that it checks to be those of the capture."""

    captured: list[StandIn]
    error: Exception | None

    def __init__(self, step: Step, ids: Tensor, positions: Tensor) -> None:
        if self.error is not None:
            raise self.error
        self.step = step
        batch = step.__self__._batch  # type: ignore[attr-defined]
        self.read = self._addresses(batch.store)
        self.store = batch.store
        self.shape = ids.shape
        self.replays = 0
        self.is_released = False
        self.captured.append(self)

    @staticmethod
    def _addresses(store: stores.RaggedStore) -> list[int]:
        tensors = [store.rows.lengths, store.rows.cu_seqlens_k, store._newest]
        tensors += [buffer for buffers in store.layers if buffers for buffer in buffers]
        return [tensor.data_ptr() for tensor in tensors]

    def replay(self, ids: Tensor, positions: Tensor) -> Tensor:
        assert not self.is_released
        assert ids.shape == positions.shape == self.shape
        assert self._addresses(self.store) == self.read, "a graph would read old memory"
        self.replays += 1
        return self.step(ids, positions)

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


def plant_graphs(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Has steps captured as stand-ins from now on; says nothing against it."""
    StandIn.captured, StandIn.error = [], None
    monkeypatch.setattr(runner, "StepGraph", StandIn)
    monkeypatch.setattr(runner, "run_on_side_stream", lambda step, *given: step(*given))
    monkeypatch.setattr(session, "uncapturable_reason", lambda head: None)
    return StandIn
