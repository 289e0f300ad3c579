"""Bad input to the patched layer: one sentence each, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from padless.errors import UnsupportedError
from padless.hf.eras import ERAS, era_of
from padless.llama import forward, forward_2, replace_llama_attn_with_flash_attn
from padless.llama.engage import engage

FORWARDS = [forward, forward_2]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (torch.ones(2, 3, 32).long(), TypeError, "hidden_states must be a floating tensor, got"),
        (None, TypeError, "hidden_states must be a floating tensor, got NoneType"),
        (torch.ones(2, 32), ValueError, r"shape \(batch, seqlen, hidden_size\).*got \(2, 32\)"),
        (torch.ones(2, 0, 32), ValueError, r"at least one token, got \(2, 0, 32\)"),
        (torch.ones(0, 3, 32), ValueError, r"at least one token, got \(0, 3, 32\)"),
    ],
)
def test_bad_hidden_states_are_refused(model, function, hidden, error, message) -> None:
    with pytest.raises(error, match=message):
        function(model.model.layers[0].self_attn, hidden)


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"attention_mask must have shape .*got \(2, 4\)"),
        (torch.ones(3, 5), ValueError, r"attention_mask must have shape .*got \(3, 5\)"),
        (torch.ones(2, 6), ValueError, r"attention_mask must have shape .*got \(2, 6\)"),
        (torch.ones(5), ValueError, r"attention_mask must have shape .*got \(5,\)"),
        (torch.ones(2, 5, 5), ValueError, r"attention_mask must have shape .*got \(2, 5, 5\)"),
        (torch.ones(2, 1, 4, 5), ValueError, r"attention_mask must have shape .*\(2, 1, 4, 5\)"),
        (torch.ones(2, 1, 5, 4), ValueError, r"attention_mask must have shape .*\(2, 1, 5, 4\)"),
        (torch.ones(2, 3, 5, 5), ValueError, r"attention_mask must have shape .*\(2, 3, 5, 5\)"),
        (
            torch.ones(2, 1, 5, 5).long(),
            TypeError,
            r"a 4D attention_mask must be bool \(True = attend\) or float .*got torch.int64",
        ),
    ],
)
def test_mask_that_fits_nothing_is_refused(model, function, mode, mask, error, message) -> None:
    layer = model.train(mode == "train").model.layers[0].self_attn
    with pytest.raises(error, match=message):
        function(layer, torch.ones(2, 5, 32), mask)


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_2d_mask_meant_to_be_added_is_refused(model, function, mode) -> None:
    layer = model.train(mode == "train").model.layers[0].self_attn
    additive = torch.tensor([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="must be 1 at real tokens and 0 at padding, got negative"):
        function(layer, torch.ones(2, 3, 32), additive)


@pytest.mark.parametrize("function", FORWARDS)
def test_refused_mask_leaves_the_cache_as_it_was(model, function) -> None:
    layer, cache = model.model.layers[0].self_attn, DynamicCache()
    function(layer, torch.ones(2, 5, 32), None, None, cache, use_cache=True)
    for mask in (torch.ones(2, 4), torch.ones(2, 1, 3, 7), torch.ones(2, 1, 3, 8).long()):
        with pytest.raises((ValueError, TypeError)):
            function(layer, torch.ones(2, 3, 32), mask, None, cache, use_cache=True)
        assert cache.get_seq_length() == 5


@pytest.mark.parametrize("path", ["sdpa", "flash"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_row_of_padding_alone_is_finite_and_hurts_no_other(model, path, mode) -> None:
    model.train(mode == "train")
    ids = torch.randint(1, 32, (3, 6))
    mask = torch.ones(3, 6).long()
    mask[1] = 0
    mask[2, :2] = 0
    want = model(ids, attention_mask=mask, use_cache=False).logits
    with engage(path):
        got = model(ids, attention_mask=mask, use_cache=False).logits
        got.sum().backward()
    assert torch.isfinite(got).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", FORWARDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_of_padding_alone_is_finite(model, function, mode) -> None:
    layer = model.train(mode == "train").model.layers[0].self_attn
    hidden = torch.randn(2, 4, 32, requires_grad=True)
    out: Tensor = function(layer, hidden, torch.zeros(2, 4, dtype=torch.bool))[0]
    out.sum().backward()
    assert out.shape == (2, 4, 32) and torch.isfinite(out).all()
    assert torch.isfinite(hidden.grad).all()


def test_one_token_is_served(model) -> None:
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(2, 1, 32)
    want = forward_2(layer, hidden)[0]
    torch.testing.assert_close(forward(layer, hidden)[0], want)


@pytest.mark.parametrize("version", ["4.27.4", "3.5.1"])
def test_transformers_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(
        UnsupportedError,
        match=rf"transformers must be 4.28 or newer, got {version}; upgrade transformers",
    ):
        era_of(Version(version))


def test_engaging_on_an_old_transformers_changes_nothing(monkeypatch, model) -> None:
    stock = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr("transformers.__version__", "4.27.4")
    with pytest.raises(UnsupportedError, match=r"got 4.27.4; upgrade transformers"):
        replace_llama_attn_with_flash_attn()
    assert type(model.model.layers[0].self_attn).forward is stock


@pytest.mark.parametrize(
    ("version", "era"),
    [("4.28.0", "A"), ("4.33.3", "B"), ("4.34.0", "C"), ("4.36.0", "E"), ("4.47.1", "I'"),
     ("4.52.4", "K"), ("5.0.0rc1", "O"), ("5.14.0.dev0", "Q"), ("5.23.0", "Q"), ("6.0", "Q")],
)  # fmt: skip
def test_era_of_a_release(version: str, era: str) -> None:
    assert era_of(Version(version)).name == era


def test_eras_are_in_order() -> None:
    firsts = [Version(era.first) for era in ERAS]
    assert firsts == sorted(firsts) and len(set(firsts)) == 18
