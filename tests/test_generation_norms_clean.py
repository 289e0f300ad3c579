"""Norms of a `generate` call as torch's own kernel: nothing of it is seen, or stays, elsewhere."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import padless
from norm_cases import NEW, NORMS, build_model, generate, is_clean, plant_kernel
from padless.unpadded.fused import FusedModules
from padless.unpadded.norms import NORM

pytestmark = pytest.mark.skipif(
    not hasattr(F, "rms_norm"), reason="torch before 2.4 has no rms_norm"
)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return plant_kernel(monkeypatch)


class FailAt:
    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("in the middle")


@pytest.mark.parametrize("at", [1, 2, 5], ids=["prompt", "first step", "later"])
def test_nothing_stays_after_an_exception_inside_the_model(
    at: int, model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    want = generate(model)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(FailAt(at))
    with padless.patch(model):
        with pytest.raises(ZeroDivisionError):
            generate(model)
        assert calls and is_clean(model)
        hook.remove()
        assert torch.equal(generate(model), want)
    assert is_clean(model)


def test_others_see_nothing_between_the_steps(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    other, seen = build_model(), []
    ids = torch.arange(3, 8)[None]
    plain = other(ids, use_cache=False).logits

    def look(given: Tensor, scores: Tensor) -> Tensor:
        seen.append(is_clean(model) and is_clean(pickle.loads(pickle.dumps(model))))
        before = len(calls)
        for each in (other, model):
            torch.testing.assert_close(each(ids, use_cache=False).logits, plain)
        assert len(calls) == before
        return scores

    with padless.patch(model):
        generate(model, logits_processor=LogitsProcessorList([look]))
    assert seen == NEW * [True] and calls


class CopyOnce:
    """A hook that copies a model while a step runs; a copy's own hook does nothing."""

    model: Any = None
    made: Any = None

    def __init__(self, how: str = "") -> None:
        self.how = how

    def __call__(self, *args: Any) -> None:
        if self.model is None:
            return
        model, self.model = self.model, None
        assert not is_clean(model)
        as_bytes = self.how == "pickle"
        self.made = pickle.loads(pickle.dumps(model)) if as_bytes else copy.deepcopy(model)

    def __reduce__(self) -> Any:
        return CopyOnce, ()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_inside_a_step_is_an_ordinary_model(
    how: str, model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    ids = torch.arange(3, 8)[None]
    hook = CopyOnce(how)
    hook.model = model
    model.model.layers[1].mlp.register_forward_pre_hook(hook)
    with padless.patch(model):
        generate(model)
    made = [m for m in hook.made.modules() if type(m) is LlamaRMSNorm]
    assert len(made) == NORMS
    for norm in made:
        assert norm.forward.__self__ is norm
        assert norm.forward.__func__ is LlamaRMSNorm.forward
    calls.clear()
    want = model(ids, use_cache=False).logits
    torch.testing.assert_close(hook.made(ids, use_cache=False).logits, want)
    assert calls == [] and is_clean(model)


def test_state_is_untouched_inside_a_step(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    names = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    with torch.no_grad(), FusedModules(model.modules(), [NORM]).in_force():
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_modules()] == modules


def test_a_forward_that_somebody_binds_on_the_way_stays(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    fused, norm, x = FusedModules(model.modules(), [NORM]), model.model.norm, torch.randn(1, 32)
    norm.forward = forward = lambda hidden_states: hidden_states
    with torch.no_grad(), fused.in_force():
        assert norm(x) is x
    assert vars(norm).pop("forward") is forward
    with torch.no_grad(), fused.in_force():
        norm.forward = forward
    assert vars(norm).pop("forward") is forward
    assert calls == [] and is_clean(model)


# Several threads


@pytest.fixture
def met() -> Iterator[Callable[[], None]]:
    """Lets two threads go on when both have come here; a second visit of both does not wait."""
    barrier = threading.Barrier(2, timeout=30)
    visits = threading.local()

    def meet() -> None:
        if not getattr(visits, "once", False):
            visits.once = True
            barrier.wait()

    yield meet
    barrier.abort()


def test_two_threads_generate_with_one_model(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]], met: Callable[[], None]
) -> None:
    want, got, left = generate(model), [], []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: met())
    ends = iter((3, NEW))

    def run(new: int) -> None:
        # Both are inside of the prompt's forward; the one that is done first takes nothing away.
        got.append(generate(model, new=new))
        left.append(is_clean(model))

    with padless.patch(model):
        threads = [threading.Thread(target=run, args=(new,)) for new in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 2
    for tokens in got:
        assert torch.equal(tokens, want[:, : tokens.shape[1]])
    assert len(calls) == (3 + NEW) * NORMS
    assert is_clean(model)


def test_counting_keeps_the_norms_for_the_last(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    fused, again = FusedModules(model.modules(), [NORM]), FusedModules(model.modules(), [NORM])
    norm, x = model.model.norm, torch.randn(1, 32)
    with torch.no_grad():
        with fused.in_force():
            with again.in_force():
                # Made while they are in force, a list finds the same norms.
                assert len(FusedModules(model.modules(), [NORM])._modules) == NORMS
            norm(x)
            assert len(calls) == 1 and not is_clean(model)
        assert is_clean(model)
        norm(x)
    assert len(calls) == 1


def test_another_thread_that_does_not_generate_computes_as_ever(
    model: LlamaForCausalLM, calls: list[tuple[int, ...]]
) -> None:
    norm, x, outs = model.model.norm, torch.randn(1, 32, requires_grad=True), []

    def compute() -> None:
        with torch.no_grad(), FusedModules(LlamaRMSNorm(8).modules(), [NORM]).in_force():
            pass  # It generates something else, and is between two steps.
        outs.append(norm(x))

    with torch.no_grad(), FusedModules(model.modules(), [NORM]).in_force():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert not is_clean(model)
    assert calls == []
    assert torch.equal(outs[0], norm(x)) and outs[0].requires_grad
