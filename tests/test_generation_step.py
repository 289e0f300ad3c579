"""What a decoding step does outside of its graph: the device waits for the host there.

Counted in tensor operations, each of which is a launch and some Python in front of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM

import padless
from norm_cases import build_model, generate
from padless.generation import graph as graph_module
from padless.generation import runner
from padless.unpadded import ended, session

# Ids and positions go in; logits come out, in memory that the next replay leaves alone.
INTO_THE_GRAPH = Counter(copy_=2, clone=1)


class Operations(TorchDispatchMode):
    """Counts operations by name, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Unreplayed:
    """A CUDA graph whose replay launches nothing; what was captured has run once, by itself."""

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "") -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Lists the operations of each step's forward, replays counted as nothing."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Unreplayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(graph_module, "_capturing", torch.no_grad())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(graph_module, "_side_stream", lambda device: None)
    monkeypatch.setattr(runner, "run_on_side_stream", lambda step, *given: step(*given))
    monkeypatch.setattr(session, "uncapturable_reason", lambda head: None)
    seen: list[Counter[str]] = []
    serve = session.Session.serve

    def counted(self: session.Session, *args: Any) -> Any:
        with Operations() as operations:
            out = serve(self, *args)
        seen.append(operations.names)
        return out

    monkeypatch.setattr(session.Session, "serve", counted)
    return seen


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


# The prompt, a step that runs eagerly and the capture with its replay stand in front.
_FIRST_REPLAY = 3


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_a_step_copies_in_and_copies_out(
    options: dict[str, Any], model: LlamaForCausalLM, steps: list[Counter[str]]
) -> None:
    with padless.patch(model) as handle:
        generate(model, new=20, **options)
        assert handle.report().graph_replays == 18
    assert steps[_FIRST_REPLAY:] == 17 * [INTO_THE_GRAPH]


def test_ends_are_looked_for_once_in_some_steps(
    model: LlamaForCausalLM, steps: list[Counter[str]]
) -> None:
    """An end token that never comes costs a handful of operations in sixteen steps."""
    with padless.patch(model):
        generate(model, new=40, eos_token_id=63)
    assert len(steps) == 40, "a token of the standing logits is the end token"
    asked = [
        number
        for number, names in enumerate(steps)
        if number >= _FIRST_REPLAY and names != INTO_THE_GRAPH
    ]
    assert asked == [ended._ASK_EVERY, 2 * ended._ASK_EVERY]
    for number in asked:
        assert (steps[number] - INTO_THE_GRAPH).total() <= 10, steps[number]


def test_without_a_mask_a_position_is_made(
    model: LlamaForCausalLM, steps: list[Counter[str]]
) -> None:
    with torch.no_grad(), padless.patch(model):
        model.generate(input_ids=torch.arange(3, 13).view(2, 5), max_new_tokens=8, do_sample=False)
    assert len(steps) == 8
    assert all((names - INTO_THE_GRAPH).total() <= 1 for names in steps[_FIRST_REPLAY:])


def test_a_forward_s_logits_stay_what_they_were(
    model: LlamaForCausalLM, steps: list[Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who keeps an output shares its memory with the graph."""
    kept: list[Tensor] = []
    serve = session.Session.serve

    def keep(self: session.Session, *args: Any) -> Any:
        out = serve(self, *args)
        kept.append(out.logits)
        return out

    monkeypatch.setattr(session.Session, "serve", keep)
    with padless.patch(model):
        generate(model, new=8)
    assert len({logits.data_ptr() for logits in kept}) == 8


@pytest.mark.parametrize("new", [1, 2, 9])
def test_whether_a_graph_can_be_captured_is_found_out_behind_the_first_token(
    new: int, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    reason_of, prompt_of = session.uncapturable_reason, session.Session._prompt

    def reason(head: Any) -> str | None:
        seen.append("looked")
        return reason_of(head)

    def prompt(self: session.Session, *args: Any) -> Any:
        found = prompt_of(self, *args)
        seen.append("prompt")
        return found

    monkeypatch.setattr(session, "uncapturable_reason", reason)
    monkeypatch.setattr(session.Session, "_prompt", prompt)
    with padless.patch(model):
        generate(model, new=new)
    assert seen == (["prompt"] if new == 1 else ["prompt", "looked"])


def test_no_cache_is_made_beside_the_one_of_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("__init__", "update"):
        stock = getattr(DynamicCache, name)

        def counted(
            self: Any, *args: Any, name: str = name, stock: Any = stock, **rest: Any
        ) -> Any:
            made.append(name)
            return stock(self, *args, **rest)

        monkeypatch.setattr(DynamicCache, name, counted)
    model = build_model()
    with padless.patch(model) as handle:
        generate(model, new=5)
        assert handle.report().decoding_steps == 4
    # The one that `generate` brings along, and nothing is put into it.
    assert made == ["__init__"]
