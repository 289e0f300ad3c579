"""A `generate` call reads a token late whether it is over; the results are as if it had not.

Graphs are stand-ins here: a step is only launched ahead where steps are replays.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import utils

import padless
from graph_cases import StandIn, plant_graphs
from norm_cases import build_model, generate
from padless.generation import store as stores
from padless.unpadded import generate as generate_module
from padless.unpadded import late_stop
from padless.unpadded.late_stop import LateStop

PROMPT, MOST = 5, 30


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    return plant_graphs(monkeypatch)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


def _ends(model: Any, **options: Any) -> list[int]:
    """Finds tokens that end all rows after some steps, and before the call's most."""
    plain = generate(model, new=MOST, **options)[:, PROMPT:].tolist()
    return [row[number] for row, number in zip(plain, (9, 12, 6), strict=True)]


def test_the_next_step_is_launched_before_the_answer_is_read(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    replay, ask, read = StandIn.replay, late_stop._Answer.ask, late_stop._Answer.read

    def note(name: str, sound: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (log.append(name), sound(*args))[1]

    monkeypatch.setattr(StandIn, "replay", note("replay", replay))
    monkeypatch.setattr(late_stop._Answer, "ask", note("ask", ask))
    monkeypatch.setattr(late_stop._Answer, "read", note("read", read))
    with padless.patch(model):
        generate(model, new=8)
    # Behind the prompt and a warm step come six replays, the last of which is known to be it.
    assert log == ["ask", "ask", "read"] + 5 * ["replay", "ask", "read"] + ["replay", "read"]


class _Listener:
    def put(self, tokens: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"return_dict_in_generate": True}, id="outputs"),
        pytest.param({"logits_processor": LogitsProcessorList([lambda i, s: s])}, id="processor"),
        pytest.param({"stopping_criteria": [lambda i, s: i[:, -1] < 0]}, id="criterion"),
        pytest.param({"prefix_allowed_tokens_fn": lambda b, i: list(range(64))}, id="prefix"),
        pytest.param({"streamer": _Listener()}, id="streamer"),
    ],
)
def test_whoever_sees_steps_sees_none_too_many(
    options: dict[str, Any], model: LlamaForCausalLM, graphs: type[StandIn]
) -> None:
    ids = torch.arange(3, 8)[None]
    given = {"input_ids": ids, "do_sample": False, "max_new_tokens": MOST, "pad_token_id": 0}
    end = int(model.generate(**given)[0, PROMPT + 9])
    given |= {"eos_token_id": end, **options}
    want = model.generate(**given)
    want = want if isinstance(want, Tensor) else want.sequences
    with padless.patch(model) as handle:
        got = model.generate(**given)
        steps = handle.report().decoding_steps
    assert torch.equal(got if isinstance(got, Tensor) else got.sequences, want)
    assert want.shape[1] < PROMPT + MOST
    assert steps == want.shape[1] - PROMPT - 1


def test_beams_are_asked_as_ever(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"new": MOST, "eos_token_id": _ends(model), "num_beams": 3}
    want = generate(model, **options)
    monkeypatch.setattr(LateStop, "goes_on", lambda self, is_over: pytest.fail("was asked"))
    with padless.patch(model):
        assert torch.equal(generate(model, **options), want)


def test_a_hook_of_the_caller_s_sees_none_too_many(
    model: LlamaForCausalLM, graphs: type[StandIn]
) -> None:
    options = {"new": MOST, "eos_token_id": _ends(model)}
    seen = []
    model.register_forward_hook(lambda *args: seen.append(1))
    want = generate(model, **options)
    expected, seen[:] = len(seen), []
    with padless.patch(model):
        assert torch.equal(generate(model, **options), want)
    assert len(seen) == expected


class Looking(LlamaForCausalLM):
    """Looks at the tokens before the caller does."""

    seen: Tensor

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = super().generate(*args, **kwargs)
        return self.seen


def test_a_subclass_sees_what_is_returned(model: LlamaForCausalLM, graphs: type[StandIn]) -> None:
    options = {"new": MOST, "eos_token_id": _ends(model)}
    want = generate(model, **options)
    model.__class__ = Looking
    with padless.patch(model):
        got = generate(model, **options)
        assert torch.equal(model.seen, want) and torch.equal(got, want)


def test_a_step_that_would_grow_buffers_is_not_launched_ahead(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_STEP", 1)
    monkeypatch.setattr(stores.RaggedStore, "_room", lambda self, filled: filled + 3)
    options = {"new": MOST, "eos_token_id": _ends(model)}
    want = generate(model, **options)
    grown = []
    make_room = stores.RaggedStore.make_room
    monkeypatch.setattr(
        stores.RaggedStore, "make_room", lambda self: (grown.append(make_room(self)), grown[-1])[1]
    )
    asked_ahead = []
    ask = LateStop._ask

    def note(self: LateStop, is_over: Tensor) -> Any:
        asked_ahead.append(len(grown))
        return ask(self, is_over)

    monkeypatch.setattr(LateStop, "_ask", note)
    with padless.patch(model):
        assert torch.equal(generate(model, **options), want)
    # The step behind each answer that is read late is the one with that number.
    assert asked_ahead and not any(grown[step] for step in asked_ahead if step < len(grown))


def test_an_exception_leaves_transformers_as_it_was(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attributes() -> list[Any]:
        check = getattr(utils, "StopCheck", None)
        return [GenerationMixin._has_unfinished_sequences, check and check.__call__]

    before, during = attributes(), []
    replay = StandIn.replay

    def fail(self: StandIn, ids: Tensor, positions: Tensor) -> Tensor:
        during.append(attributes())
        if len(during) == 3:
            raise ZeroDivisionError
        return replay(self, ids, positions)

    monkeypatch.setattr(StandIn, "replay", fail)
    with padless.patch(model):
        with pytest.raises(ZeroDivisionError):
            generate(model)
        assert attributes() == before and during[0][0] is not before[0]
        assert late_stop._users == 0 and late_stop._changes == []


def test_other_models_and_threads_ask_as_ever(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one call runs ahead, an unpatched model generates inside of it, and beside it."""
    other = build_model()
    options = {"new": MOST, "eos_token_id": _ends(other)}
    want = generate(other, **options)
    found: list[Tensor] = []
    replay = StandIn.replay

    def beside() -> None:
        found.append(generate(other, **options))

    def nested(self: StandIn, ids: Tensor, positions: Tensor) -> Tensor:
        if self.replays in (1, 2):
            thread = threading.Thread(target=beside)
            (beside if self.replays == 1 else thread.start)()
            if thread.ident is not None:
                thread.join()
        return replay(self, ids, positions)

    monkeypatch.setattr(StandIn, "replay", nested)
    with padless.patch(model):
        assert torch.equal(generate(model, **options), want)
    assert len(found) == 2 and all(torch.equal(each, want) for each in found)


def test_a_call_leaves_no_cycle(
    model: LlamaForCausalLM, graphs: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call held is gone with it, and not when the collector comes next."""
    made: list[weakref.ref[Any]] = []
    session = generate_module.Session

    def noted(*args: Any) -> Any:
        found = session(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(generate_module, "Session", noted)
    gc.collect()
    gc.disable()
    try:
        with padless.patch(model):
            generate(model)
            graphs.captured.clear()
            assert made and all(each() is None for each in made)
    finally:
        gc.enable()
