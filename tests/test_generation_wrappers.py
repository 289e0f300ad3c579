"""`generate` of patched models in other hands: copies, adapters, threads, modes, two patches."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import padless
from padless.generation.runner import StepRunner
from padless.unpadded import proof

STEPS = 9


@pytest.fixture
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


def _generate(model: Any, **options: Any) -> Tensor:
    ids = torch.arange(3, 18).view(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    tokens: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=STEPS + 1, **options
    )
    return tokens


@pytest.mark.requires("peft")
def test_adapters_take_part(model: LlamaForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    plain = _generate(model)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    want = _generate(adapted)
    assert not torch.equal(want, plain)
    with padless.patch(adapted) as handle:
        assert torch.equal(_generate(adapted), want)
        assert handle.report().decoding_steps == STEPS


def test_a_copy_generates_by_itself(model: LlamaForCausalLM) -> None:
    want = _generate(model)
    handle = padless.patch(model)
    made = copy.deepcopy(model)
    assert made.generate.__self__ is made
    assert torch.equal(_generate(made), want)
    assert handle.report().generations == 0
    handle.undo()
    assert torch.equal(_generate(made), want)


def test_a_pickled_model_is_an_unpatched_one(model: LlamaForCausalLM) -> None:
    want = _generate(model)
    with padless.patch(model) as handle:
        made = pickle.loads(pickle.dumps(model))
        assert torch.equal(_generate(made), want)
        assert handle.report().generations == 0


def test_threads_do_not_see_each_other(model: LlamaForCausalLM) -> None:
    want, got = _generate(model), []
    with padless.patch(model) as handle:
        threads = [threading.Thread(target=lambda: got.append(_generate(model))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handle.report().decoding_steps == 4 * STEPS
    assert len(got) == 4 and all(torch.equal(tokens, want) for tokens in got)


def test_a_generate_inside_a_generate(model: LlamaForCausalLM) -> None:
    want, inside = _generate(model), []

    def again(ids: Tensor, scores: Tensor) -> Tensor:
        if len(inside) < 2:
            inside.append(None)
            inside[-1] = _generate(model)
        return scores

    with padless.patch(model) as handle:
        assert torch.equal(_generate(model, logits_processor=[again]), want)
        assert handle.report().decoding_steps == 3 * STEPS
    assert all(torch.equal(tokens, want) for tokens in inside)


def test_inference_mode(model: LlamaForCausalLM) -> None:
    want = _generate(model)
    with torch.inference_mode(), padless.patch(model) as handle:
        assert torch.equal(_generate(model), want)
        assert handle.report().decoding_steps == STEPS


def test_both_patches_at_once(model: LlamaForCausalLM) -> None:
    want = _generate(model)
    with padless.patch(model) as own, padless.patch_llama() as all_of_them:
        assert torch.equal(_generate(model), want)
        steps = (own.report().decoding_steps, all_of_them.report().decoding_steps)
    assert steps == (STEPS, 0)
    assert torch.equal(_generate(model), want)


def test_guidance_asks_the_model_between_the_steps(model: LlamaForCausalLM) -> None:
    want = _generate(model, guidance_scale=1.5)
    with padless.patch(model) as handle:
        assert torch.equal(_generate(model, guidance_scale=1.5), want)
        report = handle.report()
    assert report.decoding_steps == STEPS
    # Its own calls have a cache of their own.
    assert report.stock == {"a call behind a cache": STEPS}


def test_a_generate_of_somebody_else_is_left_alone(model: LlamaForCausalLM) -> None:
    model.generate = lambda **options: "theirs"
    with padless.patch(model):
        assert model.generate() == "theirs"
    assert model.generate() == "theirs"


@pytest.mark.parametrize("fault", [None, "raises", "other tokens"])
@pytest.mark.parametrize("patch", ["model", "process"])
def test_a_transformers_that_nobody_has_tested_is_tried_first(
    patch: str, fault: str | None, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = _generate(model)
    monkeypatch.setattr(proof, "NEWEST_TESTED", Version("4.48"))
    monkeypatch.setattr(proof, "_generation_faults", {})
    if fault is not None:
        sound = StepRunner.run

        def run(self: Any, *given: Any) -> Tensor:
            if fault == "raises":
                raise AttributeError("no such thing as a cache")
            return sound(self, *given).flip(-1)

        monkeypatch.setattr(StepRunner, "run", run)
    with padless.patch(model) if patch == "model" else padless.patch_llama() as handle:
        assert torch.equal(_generate(model), want)
        report = handle.report()
    assert report.decoding_steps == (STEPS if fault is None else 0)
    (note,) = report.generation_notes or [""]
    assert note.startswith("" if fault is None else "on transformers ")
    assert fault != "raises" or note.endswith("AttributeError: no such thing as a cache")
    assert fault != "other tokens" or note.endswith("other tokens")
