"""The patch under what wraps models: accelerate's hooks and torch.compile."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from padless.llama.engage import engage, suspended

LAYERS = 2


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def _hook(model: torch.nn.Module) -> None:
    """Wraps the attention layers as a device_map does with what it moves."""
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())


def _logits(model: torch.nn.Module) -> Tensor:
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


@pytest.mark.parametrize("path", ["sdpa", "flash"])
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_layers_with_hooks_of_accelerate_are_served(model, path: str, when: str) -> None:
    want = _logits(model)
    if when == "before":
        _hook(model)
    with engage(path) as handle:
        if when == "after":
            _hook(model)
        got = _logits(model)
        assert [layer.calls for layer in handle.report().layers] == [1] * LAYERS
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(_logits(model), want)
    for layer in model.model.layers:
        # Also where the hook came while ours stood there: it must not hold on to it.
        assert layer.self_attn._old_forward.__func__ is type(layer.self_attn).forward


@torch.no_grad()
def test_suspended_reaches_layers_hooked_meanwhile(model) -> None:
    want = _logits(model)
    with engage("flash") as handle:
        _hook(model)
        with suspended():
            assert torch.equal(_logits(model), want)
        _logits(model)
        assert [layer.calls for layer in handle.report().layers] == [1] * LAYERS


@pytest.mark.parametrize("path", ["sdpa", "flash"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiled_model_gives_the_same(model, path: str, mode: str) -> None:
    model.train(mode == "train")
    want = _logits(model)
    torch._dynamo.reset()
    with engage(path) as handle:
        got = _logits(torch.compile(model, backend="eager"))
        assert len(handle.report().layers) == LAYERS
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
