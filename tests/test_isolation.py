"""A verdict is the same wherever the first question comes from, and leaves no trace there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from padless.backends import sdpa
from padless.qualification import forget_verdicts, qualify
from padless.qualification.isolation import isolated
from planted_backends import FAULTS, flash_like, planted
from qualification_cases import CPU, FLOAT32, TRAINING, inside_backward, only_file

pytestmark = pytest.mark.usefixtures("cache")


class _Recording(TorchDispatchMode):
    """A mode that sees every operation, as selective checkpointing is one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _inside_operator(act: Callable[[], None]) -> None:
    library = torch.library.Library("padless_test", "FRAGMENT")
    library.define("act(Tensor x) -> Tensor")

    def run(x: Tensor) -> Tensor:
        act()
        return x.clone()

    library.impl("act", run, "CPU")
    torch.ops.padless_test.act(torch.ones(2))


def _inside_checkpoint(act: Callable[[], None], *, use_reentrant: bool) -> None:
    done = []

    def region(x: Tensor) -> Tensor:
        # In the first pass alone, as a verdict is remembered.
        if not done:
            act()
            done.append(True)
        return (x @ x).exp()

    x = torch.randn(3, 3, requires_grad=True)
    checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()


def _inside_trace(act: Callable[[], None]) -> None:
    def traced(x: Tensor) -> Tensor:
        act()
        return x * 2

    graph = torch.jit.trace(traced, torch.ones(3), check_trace=False).graph
    assert len(list(graph.nodes())) <= 3


def _inside_transform(act: Callable[[], None]) -> None:
    torch.func.vmap(lambda x: (act(), 2 * x)[1])(torch.ones(3))
    torch.func.grad(lambda x: (act(), 2 * x.sum())[1])(torch.ones(3))


def _within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[..., None]:
    def place(act: Callable[[], None]) -> None:
        with context():
            act()

    return place


PLACES: dict[str, Callable[[Callable[[], None]], None]] = {
    "nowhere special": _within(nullcontext),
    "inference_mode": _within(torch.inference_mode),
    "no_grad": _within(torch.no_grad),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "default device": _within(lambda: torch.device("meta")),
    "fake tensors": _within(FakeTensorMode),
    "saved tensor hooks": _within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: 1 / 0, lambda x: x)
    ),
    "no saved tensor hooks": _within(
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here")
    ),
    "backward": inside_backward,
    "operator": _inside_operator,
    "checkpoint": lambda act: _inside_checkpoint(act, use_reentrant=False),
    "reentrant checkpoint": lambda act: _inside_checkpoint(act, use_reentrant=True),
    "trace": _inside_trace,
    "transform": _inside_transform,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", [None, "dq_off_by_2_percent"])
def test_the_verdict_is_the_same_in_every_mode(place: str, fault: str | None) -> None:
    backend = planted(FAULTS[fault] if fault else flash_like)
    expected = qualify(backend, TRAINING)
    verdicts = []

    def act() -> None:
        forget_verdicts()
        (Path(os.environ["PADLESS_CACHE"])).joinpath(only_name()).unlink(missing_ok=True)
        verdicts.append(qualify(backend, TRAINING))

    PLACES[place](act)
    assert verdicts
    for verdict in verdicts:
        assert replace(verdict, elapsed_ms=0) == replace(expected, elapsed_ms=0)
    assert len(backend.calls) == 3 * (1 + len(verdicts)) or fault


def only_name() -> str:
    return only_file(Path(os.environ["PADLESS_CACHE"])).name


def test_isolation_is_as_a_fresh_thread() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), isolated(CPU):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_cpu_enabled()
        x = torch.ones(2, 2, requires_grad=True)
        assert (x @ x).dtype == torch.float32
        assert (x @ x).requires_grad


def test_a_mode_around_it_sees_nothing_of_it() -> None:
    with _Recording() as recording:
        assert qualify(sdpa, TRAINING).passed
    assert recording.seen == []


def test_nothing_of_the_process_is_changed() -> None:
    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_cpu_enabled(),
            torch.get_float32_matmul_precision(),
            str(torch._C._dispatch_tls_local_include_set()),
            str(torch._C._dispatch_tls_local_exclude_set()),
        ]

    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        before = state()
        assert qualify(sdpa, TRAINING).passed
        with torch.inference_mode():
            inside = state()
            assert qualify(sdpa, FLOAT32).passed
            assert state() == inside
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
