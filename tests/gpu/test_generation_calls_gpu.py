"""What surrounds a `generate` call on a CUDA device: memory, exceptions, what is not captured."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from generation_gpu_cases import (
    DTYPES,
    EAGER_STEPS,
    build_model,
    generate,
    prompt_of,
)
from torch import Tensor
from transformers import LogitsProcessorList

import padless
from padless.unpadded import session

pytestmark = pytest.mark.gpu


class _FailAt:
    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("in the middle")
        return scores


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [None, 1, 2, 3, 10])
def test_nothing_stays_on_the_device(at: int | None, dtype: torch.dtype) -> None:
    model = build_model(dtype)
    with padless.patch(model):
        generate(model)  # libraries take their workspaces
        before = _allocated()
        if at is None:
            generate(model)
        else:
            with pytest.raises(ZeroDivisionError):
                generate(model, logits_processor=LogitsProcessorList([_FailAt(at)]))
        assert _allocated() == before
        assert session._current.get() is None


def test_after_an_exception_the_next_call_is_right() -> None:
    model = build_model()
    want = generate(model)
    with padless.patch(model) as handle:
        with pytest.raises(ZeroDivisionError):
            generate(model, logits_processor=LogitsProcessorList([_FailAt(9)]))
        assert torch.equal(generate(model), want)
        assert handle.report().generations == 2
    assert torch.equal(generate(model), want)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    # Rope that scales with the longest position asks the device for it at every step.
    model = build_model()
    want = generate(model)

    class Asking(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert x.float().sum().item() == x.float().sum().item()
            return self.inner(x, *args, **kwargs)

    model.model.rotary_emb = Asking(model.model.rotary_emb)
    with padless.patch(model) as handle:
        got = generate(model)
        report = handle.report()
        assert report.graph_replays == 0 and report.decoding_steps == 47
        (note,) = report.generation_notes
        assert note.startswith("steps without a CUDA graph: ")
        # And CUDA goes on, random numbers included.
        assert torch.equal(generate(model), want)
        sampled = generate(model, do_sample=True)
    assert torch.equal(got, want)
    assert torch.equal(sampled, generate(model, do_sample=True))


def test_hooks_inside_the_model_are_run_at_every_step() -> None:
    model = build_model()
    want = generate(model)
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    with padless.patch(model) as handle:
        got = generate(model)
        report = handle.report()
    assert torch.equal(got, want)
    assert len(calls) == 48
    assert report.graph_replays == 0 and report.decoding_steps == 47
    assert list(report.generation_notes) == [
        "steps without a CUDA graph: hooks on modules inside the model, which a graph would not run"
    ]


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_modes_of_the_caller(mode: str) -> None:
    model = build_model()
    context = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cuda", torch.bfloat16),
    }[mode]
    with context, padless.patch(model) as handle:
        got = generate(model)
        report = handle.report()
    assert report.decoding_steps == 47
    if mode == "inference":
        assert torch.equal(got, generate(model))
        assert report.graph_replays == 47 - EAGER_STEPS, str(report)
    else:
        assert list(report.generation_notes) == ["steps without a CUDA graph: autocast"]


def test_weights_that_change_between_calls_are_used() -> None:
    model = build_model()
    with padless.patch(model):
        generate(model)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        got = generate(model)
    assert torch.equal(got, generate(model))


def test_the_padded_cache_is_handed_back() -> None:
    model = build_model()
    stock = generate(model, return_dict_in_generate=True)
    with padless.patch(model):
        got = generate(model, return_dict_in_generate=True)
    assert torch.equal(got.sequences, stock.sequences)
    real = torch.cat([prompt_of()["attention_mask"], torch.ones(4, 47, device="cuda")], 1).bool()
    for a, b in zip(got.past_key_values.layers, stock.past_key_values.layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            x, y = (t.transpose(1, 2)[real] for t in (x, y))
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
