"""When a session captures a step, replays it and lets go of it; graphs are stand-ins here.

What a real graph computes is tested on a CUDA device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import padless
from graph_cases import StandIn, plant_graphs
from padless.generation import graph as graph_module
from padless.generation import store as stores
from padless.generation.graph import uncapturable_reason


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    return plant_graphs(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _generate(model: LlamaForCausalLM, *, new: int | None = 10, **options: Any) -> Tensor:
    ids = torch.arange(3, 18).view(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    options = {"do_sample": False, "max_new_tokens": new, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_one_capture_serves_a_call(
    model: LlamaForCausalLM, graphs: type[StandIn], options: dict[str, Any]
) -> None:
    want = _generate(model, **options)
    with padless.patch(model) as handle:
        got = _generate(model, **options)
        report = handle.report()
    (graph,) = graphs.captured
    assert (report.decoding_steps, report.graph_replays, graph.replays) == (9, 8, 8)
    assert "9 decoding steps (sdpa), 8 by a CUDA graph" in str(report)
    assert graph.is_released
    assert torch.equal(got, want)


def test_a_call_too_short_captures_nothing(model: LlamaForCausalLM, graphs: type[StandIn]) -> None:
    with padless.patch(model) as handle:
        _generate(model, new=2)
        assert handle.report().decoding_steps == 1
    assert graphs.captured == []


def test_each_capacity_has_its_capture(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_STEP", 4)
    want = _generate(model, new=30)

    def stop(ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 35)

    with padless.patch(model) as handle:
        got = _generate(model, new=None, max_length=10_000, stopping_criteria=[stop])
        report = handle.report()
    assert len(graphs.captured) > 1
    assert all(graph.is_released for graph in graphs.captured)
    # Each begins with a step that runs eagerly.
    assert report.graph_replays == sum(graph.replays for graph in graphs.captured)
    assert report.graph_replays == 29 - len(graphs.captured)
    assert torch.equal(got, want)


def test_a_capture_that_fails_is_not_tried_again(
    model: LlamaForCausalLM, graphs: type[StandIn]
) -> None:
    want = _generate(model)
    graphs.error = RuntimeError("operation not permitted\nwhen capturing")
    with padless.patch(model) as handle:
        got = _generate(model)
        report = handle.report()
    assert torch.equal(got, want)
    reason = "steps without a CUDA graph: RuntimeError: operation not permitted"
    assert report.generation_notes == {reason: 1}
    assert f"1 generate: {reason}" in str(report)
    assert (report.decoding_steps, report.graph_replays) == (9, 0)


def test_a_graph_is_released_by_an_exception(
    model: LlamaForCausalLM, graphs: type[StandIn]
) -> None:
    want = _generate(model)
    calls = []

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise ZeroDivisionError
        return scores

    with padless.patch(model):
        with pytest.raises(ZeroDivisionError):
            _generate(model, logits_processor=LogitsProcessorList([fail]))
        (graph,) = graphs.captured
        assert graph.is_released and graph.replays == 5
        assert graph.store.layers == [None, None]
        assert torch.equal(_generate(model), want)


def test_what_keeps_a_step_from_being_captured(model: LlamaForCausalLM) -> None:
    assert uncapturable_reason(model) == "no CUDA"

    class OnCuda(nn.Parameter):
        """A parameter that says it is on a GPU."""

        is_cuda = True

    class Other(nn.Linear):
        pass

    def head(inner: nn.Module) -> nn.Module:
        outer = nn.Sequential(nn.Linear(1, 1), inner)
        first = outer[0]
        first.weight = OnCuda(torch.ones(1, 1))
        return outer

    hooked = nn.Linear(1, 1)
    hooked.register_forward_hook(lambda *args: None)
    assert str(uncapturable_reason(head(hooked))).startswith("hooks on modules inside")
    compiled = Other(1, 1)
    compiled._compiled_call_impl = lambda: None  # type: ignore[method-assign]
    assert uncapturable_reason(head(compiled)) == "compiled modules inside the model"
    assert uncapturable_reason(head(nn.Identity())) == "weights of type OnCuda"
    with torch.autocast("cpu", torch.bfloat16):
        assert uncapturable_reason(head(nn.Identity())) == "autocast"


class CudaGraph:
    """Stands in for torch's: writes down what it is asked."""

    log: list[str]
    fails_to_end = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.log.append(f"begin {capture_error_mode} {pool}")

    def capture_end(self) -> None:
        self.log.append("end")
        if self.fails_to_end:
            raise RuntimeError("the capture is invalid")

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


@pytest.fixture
def cuda_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []

    class Entered:
        def __init__(self, *args: Any) -> None:
            pass

        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *args: Any) -> None:
            log.append("leave")

    monkeypatch.setattr(CudaGraph, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CudaGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Of a CPU tensor's device.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(graph_module, "_side_stream", lambda device: None)
    monkeypatch.setattr(
        torch._C,
        "_cuda_endAllocateToPool",
        lambda index, pool: log.append(f"allocate {pool}"),
        raising=False,
    )
    return log


def test_a_capture_reads_copies_and_gives_copies(
    cuda_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        seen.append((ids, positions, torch.zeros(3, 1, 4)))
        return seen[-1][2]

    ids, positions = torch.tensor([[1], [2], [3]]), torch.tensor([[7], [8], [9]])
    graph = graph_module.StepGraph(step, ids, positions)
    assert cuda_log == ["enter", "enter", "begin thread_local pool", "end", "leave", "leave"]
    (own_ids, own_positions, own_logits), *more = seen
    assert own_ids is not ids and own_positions is not positions and not more
    logits = graph.replay(ids + 1, positions + 1)
    assert own_ids.tolist() == [[2], [3], [4]] and own_positions.tolist() == [[8], [9], [10]]
    own_logits += 1
    assert not logits.any()
    assert cuda_log[6:] == ["replay"]
    # Another device than the thread's own is entered for it (tests/test_launch.py).
    monkeypatch.setattr(graph_module, "on_device", torch.cuda.device)
    graph.replay(ids, positions)
    assert cuda_log[6:] == ["replay", "enter", "replay", "leave"]
    graph.release()
    assert cuda_log[-1] == "reset"


@pytest.mark.parametrize("fails_to_end", [False, True])
def test_a_capture_that_went_wrong_is_ended(
    cuda_log: list[str], fails_to_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaGraph, "fails_to_end", fails_to_end)

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        raise ValueError("not while capturing")

    with pytest.raises(ValueError, match="not while capturing"):
        graph_module.StepGraph(step, torch.ones(1, 2).long(), torch.ones(1, 2).long())
    sound = ["begin thread_local pool", "end"]
    assert cuda_log[2:] == [*sound, "allocate pool", *sound, "leave", "leave"]
    assert graph_module._capturing.acquire(blocking=False)
    graph_module._capturing.release()
