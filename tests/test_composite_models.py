"""A LLaMA inside of another model, with layers beside it that are none: images into Llava."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import padless
from golden.models import LAYERS, batch, build_model
from golden.steps import labels_of

IMAGE, PATCHES = 95, 4


@pytest.fixture
def model() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=build_model().config, image_token_index=IMAGE
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).train()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    ids, real = batch("left")
    ids[:, -1 - PATCHES : -1] = IMAGE
    real = real.clone()
    real[2, -1 - PATCHES :] = True
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "pixel_values": torch.randn(3, 3, 8, 8),
        "labels": labels_of(ids, real),
    }


def _step(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach(), gradients


def test_the_llama_inside_runs_on_real_tokens(model: Any, inputs: dict[str, Tensor]) -> None:
    loss, logits, gradients = _step(model, inputs)
    real = inputs["attention_mask"].bool()
    with padless.patch(model) as handle:
        got_loss, got_logits, got_gradients = _step(model, inputs)
        report = handle.report()
        patched = {name for name, each in model.named_modules() if "forward" in vars(each)}
    # Of all attention layers those of the LLaMA alone, and each of them.
    assert patched and all("language_model" in name for name in patched)
    assert len(report.layers) == LAYERS and all("Llama" in each.name for each in report.layers)
    assert report.computed_tokens == int(real.sum()) and report.stock == {}
    torch.testing.assert_close(got_loss, loss)
    torch.testing.assert_close(got_logits[real], logits[real], atol=1e-4, rtol=1e-4)
    assert got_gradients.keys() == gradients.keys()
    assert any("vision" in name for name in gradients)
    for name, gradient in gradients.items():
        # The bias of keys has none but for roundings.
        atol = 1e-5 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(got_gradients[name], gradient, rtol=0.0, atol=atol)
    after = _step(model, inputs)
    assert torch.equal(after[0], loss) and torch.equal(after[1], logits)


def test_generate_gives_the_same_tokens(model: Any, inputs: dict[str, Tensor]) -> None:
    model.eval()
    asked = {name: each for name, each in inputs.items() if name != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**asked, **options)
    with padless.patch(model) as handle:
        assert torch.equal(model.generate(**asked, **options), want)
        # Its own generate is another class's, so that what is behind the cache is counted as such.
        assert handle.report().stock == {"a call behind a cache": 7}


def test_a_model_without_a_llama_inside_is_refused() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        text_config=transformers.MistralConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        ),
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(padless.UnsupportedError, match="must hold a LLaMA"):
        padless.patch(model)
