"""One decoding step as a CUDA graph: captured once, replayed for every token after that.

A step is some hundred kernels of a few microseconds each, and to launch them takes the host ten
times as long as the device to run them. A replay is one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from padless.environment import autocasts

Step = Callable[[Tensor, Tensor], Tensor]


class StepGraph:
    """A captured step: reads its own copy of ids and positions, writes its own logits.

    Args:
        step: takes ids and positions, int64 `(1, batch)` each, and returns logits; everything else
            that it reads or writes has to stay where it is for as long as the graph is used.
        ids: of the token to come, for their shape and device.
        positions: like ids.

    Note:
        Capturing runs nothing. The step has to have run before on this device, so that kernels are
        compiled and libraries have their workspaces. The graph holds the memory of one step.
    """

    def __init__(self, step: Step, ids: Tensor, positions: Tensor) -> None:
        self._ids = ids.clone()
        self._positions = positions.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._ids, self._positions)

    def replay(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Runs the step for other tokens.

        Args:
            ids: int64 `(1, batch)`.
            positions: like ids.

        Returns:
            The logits, in memory of the caller's own.
        """
        self._ids.copy_(ids, non_blocking=True)
        self._positions.copy_(positions, non_blocking=True)
        self._graph.replay()
        # The next replay writes over them, and a caller may keep what it got.
        return self._logits.clone()

    def release(self) -> None:
        """Gives the graph's memory back."""
        self._graph.reset()
        del self._logits


def run_on_side_stream(step: Step, ids: Tensor, positions: Tensor) -> Tensor:
    """Runs a step as a capture would, on a stream of its own: what torch asks for in front of one.

    Args:
        step: as for `StepGraph`.
        ids: int64 `(1, batch)`.
        positions: like ids.
    """
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        logits = step(ids, positions)
    main.wait_stream(side)
    logits.record_stream(main)
    return logits


def uncapturable_reason(model: torch.nn.Module) -> str | None:
    """Says why a model's step must run eagerly, as far as its modules tell; None if it need not.

    Args:
        model: the language modelling head, whose own hooks run outside of the step.
    """
    if autocasts(next(model.parameters())):
        # What autocast keeps of weights in half precision would be memory of the graph.
        return "autocast"
    for module in model.modules():
        if module is model:
            continue
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return "hooks on modules inside the model, which a graph would not run"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return "compiled modules inside the model"
    for parameter in model.parameters():
        if type(parameter) is not torch.nn.Parameter:
            return f"weights of type {type(parameter).__name__}"
    return None
