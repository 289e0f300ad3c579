"""One decoding step as a CUDA graph: captured once, replayed for every token after that.

A step is some hundred kernels of a few microseconds each, and to launch them takes the host ten
times as long as the device to run them. A replay is one launch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padless.environment import autocasts
from padless.kernels.launch import on_device

Step = Callable[[Tensor, Tensor], Tensor]


class StepGraph:
    """A captured step: reads its own copy of ids and positions, writes its own logits.

    Args:
        step: takes ids and positions, int64 `(batch, 1)` each, and returns logits; everything else
            that it reads or writes has to stay where it is for as long as the graph is used.
        ids: of the token to come, for their shape and device.
        positions: like ids.

    Raises:
        Exception: whatever the step, or CUDA, raises about what cannot be captured. Nothing has
            run then, and the current stream is the one from before.

    Note:
        Capturing runs nothing. The step has to have run before by `run_on_side_stream`, so that
        kernels are compiled and libraries have their workspaces. The graph holds the memory of one
        step.
    """

    def __init__(self, step: Step, ids: Tensor, positions: Tensor) -> None:
        self._ids, self._positions = (
            x.clone(memory_format=torch.contiguous_format) for x in (ids, positions)
        )
        self._graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which leaves its stream the current one where a capture fails, and
        # empties the allocator's cache in front of each and waits for the device: that is busy with
        # the prompt, behind which the capture costs nothing.
        self._device = ids.device
        side = _side_stream(ids.device)
        with _capturing, torch.cuda.device(ids.device), torch.cuda.stream(side):
            # Other threads of the process may allocate meanwhile.
            pool = torch.cuda.graph_pool_handle()
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self._logits = step(self._ids, self._positions)
                self._graph.capture_end()
            except BaseException:
                _end_capture(self._graph, pool, ids.device)
                raise

    def replay(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Runs the step for other tokens.

        Args:
            ids: int64 `(batch, 1)`.
            positions: like ids.

        Returns:
            The logits, in memory of the caller's own.
        """
        # The device waits for this: nothing stands in front of the launch that can stand behind it.
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        with on_device(self._device):
            self._graph.replay()
        # The next replay writes over them, and a caller may keep what it got.
        return self._logits.clone()

    def release(self) -> None:
        """Gives the graph's memory back, once the device is done with it."""
        del self._logits
        self._graph.reset()


def _end_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Takes back what a capture that went wrong has begun; whatever is over already raises here."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        # Where CUDA refuses to end the capture, the allocator may not have been told.
        with contextlib.suppress(RuntimeError):
            end(device.index, pool)
    # torch has told the generator that a capture is under way, and does not tell it that one went
    # wrong: every random number after that would raise. The end of a sound one sets it right.
    sound = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        sound.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        sound.capture_end()


# Torch captures one graph at a time in a process.
_capturing = threading.Lock()
_of_thread = threading.local()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Gives this thread's stream for captures: libraries keep a workspace for each stream."""
    streams: dict[torch.device, torch.cuda.Stream]
    streams = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def run_on_side_stream(step: Step, ids: Tensor, positions: Tensor) -> Tensor:
    """Runs a step on the stream on which it is to be captured: what torch asks for before that.

    Args:
        step: as for `StepGraph`.
        ids: int64 `(batch, 1)`.
        positions: like ids.
    """
    side, main = _side_stream(ids.device), torch.cuda.current_stream(ids.device)
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
    weight = next(model.parameters())
    if not weight.is_cuda:
        return "no CUDA"
    if autocasts(weight):
        # What autocast keeps of weights in half precision would be memory of the graph.
        return "autocast"
    for module in model.modules():
        if module is model:
            continue
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return "hooks on modules inside the model, which a graph would not run"
        if is_compiled(module):
            return "compiled modules inside the model"
    for parameter in model.parameters():
        if type(parameter) is not torch.nn.Parameter:
            return f"weights of type {type(parameter).__name__}"
    return None


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module is one that torch.compile has been put on."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return type(module).__name__ == "OptimizedModule"
