"""How the steps of a `generate` call run: eagerly, or as replays of a graph captured on the way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from padless.generation.graph import Step, StepGraph, run_on_side_stream

# Steps that run eagerly in front of a capture: kernels compile and libraries set up in the first.
_WARM_UP = 1


def without_graph(reason: str) -> str:
    """Makes the note that steps run eagerly."""
    return f"steps without a CUDA graph: {reason}"


class StepRunner:
    """Runs steps that are alike but for their tokens.

    Args:
        eager: why no graph is to be captured; None if one is.
        note: told why one could not be, where that was not known before.

    Attributes:
        replays: how many steps were a graph's.
    """

    def __init__(self, eager: str | None, note: Callable[[str], None]) -> None:
        self.replays = 0
        self._eager = eager
        self._note = note
        self._graph: StepGraph | None = None
        self._warm = 0

    @property
    def is_eager(self) -> bool:
        """Whether no step is, or will be, a replay."""
        return self._eager is not None

    def run(self, step: Step, ids: Tensor, positions: Tensor) -> Tensor:
        """Computes a step's logits, `(batch, 1, vocab_size)`.

        Args:
            step: as `StepGraph` takes it, the same each time.
            ids: int64 `(batch, 1)`.
            positions: like ids.
        """
        if self._eager is not None:
            return step(ids, positions)
        if self._warm < _WARM_UP:
            self._warm += 1
            return run_on_side_stream(step, ids, positions)
        if self._graph is None:
            try:
                self._graph = StepGraph(step, ids, positions)
            except Exception as error:
                # Whatever inside the model does not suit a capture; nothing has run.
                lines = str(error).strip().splitlines() or [""]
                self._eager = f"{type(error).__name__}: {lines[0]}"
                self._note(without_graph(self._eager))
                return step(ids, positions)
        self.replays += 1
        return self._graph.replay(ids, positions)

    def begin_anew(self) -> None:
        """Lets go of the graph, whose tensors are no longer the step's."""
        self.release()
        # Other shapes may be other kernels, which a capture does not load.
        self._warm = 0

    def release(self) -> None:
        """Gives the graph's memory back."""
        if self._graph is not None:
            self._graph.release()
            self._graph = None
