"""The original's contract, row by row: S1 to S12. Each test is named after its row."""

from __future__ import annotations

import inspect
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor

from golden.models import HAS_GQA, batch, build_model, judge, oracle, patched, run_logits, until
from internvl.patch.llama_flash_attn_monkey_patch import (
    _prepare_decoder_attention_mask,
    forward,
    forward_2,
    replace_llama_attn_with_flash_attn,
)
from padless.hf.eras import installed_era
from padless.reference import causal_visible, reference_attention
from padless.selection import forget_selections

pytestmark = pytest.mark.case("contract")

ORIGINAL = (
    "self",
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_value",
    "output_attentions",
    "use_cache",
)


def _layer(heads: str | None = None, **config: object) -> torch.nn.Module:
    return build_model(heads, **config).model.layers[0].self_attn


def _judge(
    name: str, out: Tensor, layer: torch.nn.Module, hidden: Tensor, real: Tensor | None = None
) -> None:
    if real is None:
        real = torch.ones(hidden.shape[:2], dtype=torch.bool)
    baseline, truth = oracle.layer_truth(layer, hidden, oracle.causal_visible_keys(real))
    judge(name, out[real], baseline[real], truth[real])


def _positions(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1])[None].expand(hidden.shape[0], -1)


def _spy_on_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    seen: list[dict[str, object]] = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: object, **kwargs: object) -> Tensor:
        seen.append(kwargs)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def _flash_attn(monkeypatch: pytest.MonkeyPatch, function: str) -> list[dict[str, object]]:
    """Puts a stand-in flash-attn in place that checks its arguments and computes the truth."""
    calls: list[dict[str, object]] = []

    def kernel(
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert qkv.dim() == 4 and qkv.shape[1] == 3
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0
        assert cu_seqlens[-1] == qkv.shape[0] and dropout_p == 0.0 and causal
        bounds = cu_seqlens.tolist()
        assert isinstance(max_seqlen, int)
        assert max_seqlen >= max(b - a for a, b in pairwise(bounds))
        calls.append({"tokens": qkv.shape[0], "bounds": bounds})
        out = []
        for a, b in pairwise(bounds):
            q, k, v = qkv[a:b].unbind(1)
            one = reference_attention(
                q[None],
                k[None],
                v[None],
                visible=causal_visible(b - a, b - a),
                softmax_scale=softmax_scale,
            )
            out.append(one[0])
        return torch.cat(out)

    package = types.ModuleType("flash_attn")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    setattr(interface, function, kernel)
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return calls


def test_s1_replaces_the_forward_of_the_whole_process() -> None:
    built_before = build_model()
    ids, real = batch("left")
    want = run_logits(built_before, ids, real.long())[real]
    stock = modeling_llama.LlamaAttention.forward
    with replace_llama_attn_with_flash_attn() as handle:
        assert modeling_llama.LlamaAttention.forward is forward_2
        for model in (built_before, build_model()):
            handle_calls = sum(layer.calls for layer in handle.report().layers)
            torch.testing.assert_close(run_logits(model, ids, real.long())[real], want)
            assert sum(layer.calls for layer in handle.report().layers) == handle_calls + 2
    assert modeling_llama.LlamaAttention.forward is stock


def test_s1_takes_forward_and_the_mask_preparation_without_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = _layer()
    hidden = torch.randn(2, 7, 64)
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    forget_selections()
    with replace_llama_attn_with_flash_attn() as handle:
        assert modeling_llama.LlamaAttention.forward is forward
        hook = getattr(modeling_llama.LlamaModel, "_prepare_decoder_attention_mask", None)
        if installed_era().has_mask_hook:
            assert hook is _prepare_decoder_attention_mask
        else:
            assert hook is None
        out = forward(layer, hidden, None, _positions(hidden))[0]
        backends = {name for record in handle.report().layers for name in record.backends}
    forget_selections()
    assert backends == {"reference"}
    _judge("reference backend", out, layer, hidden)


@pytest.mark.parametrize("function", [forward, forward_2])
def test_s2_s6_signature_is_the_originals(function: types.FunctionType) -> None:
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert tuple(names) == ORIGINAL
    defaults = [p.default for p in list(inspect.signature(function).parameters.values())[2:7]]
    assert defaults == [None, None, None, False, False]


@pytest.mark.parametrize(
    "kernel", ["flash_attn_unpadded_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"]
)
def test_s2_s3_s5_no_mask_is_one_call_of_the_packed_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    calls = _flash_attn(monkeypatch, kernel)
    layer, hidden = _layer("mha"), torch.randn(3, 5, 64)
    out = forward(layer, hidden, None, _positions(hidden))[0]
    assert calls == [{"tokens": 15, "bounds": [0, 5, 10, 15]}]
    _judge(kernel, out, layer, hidden)


@pytest.mark.parametrize(
    "kernel", ["flash_attn_unpadded_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"]
)
@pytest.mark.parametrize("padding", ["right", "left", "mixed"])
def test_s4_s5_padding_never_reaches_the_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str, padding: str
) -> None:
    calls = _flash_attn(monkeypatch, kernel)
    layer = _layer("mha")
    _, real = batch(padding)
    hidden = torch.randn(3, real.shape[1], 64)
    out = forward(layer, hidden, real, _positions(hidden))[0]
    assert [call["tokens"] for call in calls] == [int(real.sum())]
    _judge(kernel, out, layer, hidden, real)
    # Padded back: attention's zeros, through an output projection without bias.
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))


@pytest.mark.parametrize("padding", ["none", "right"])
def test_s6_training_is_one_causal_sdpa_call(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    seen = _spy_on_sdpa(monkeypatch)
    layer = _layer().train()
    _, real = batch(padding)
    hidden = torch.randn(3, real.shape[1], 64)
    out = forward_2(layer, hidden, real, _positions(hidden))[0]
    assert len(seen) == 1
    assert seen[0]["is_causal"] is True and seen[0]["dropout_p"] == 0.0
    assert seen[0]["attn_mask"] is None
    _judge("training", out, layer, hidden, real)


@pytest.mark.parametrize("path", ["sdpa", "flash"])
def test_s6_right_padded_training_through_the_model_needs_no_mask(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    # Whatever mask this version makes for a right-padded batch, SDPA runs causal and without it.
    model = build_model().train()
    ids, real = batch("right")
    run_logits(model, ids, real.long(), use_cache=False)
    with patched(path):
        seen = _spy_on_sdpa(monkeypatch)
        run_logits(model, ids, real.long(), use_cache=False)
    assert len(seen) == {"sdpa": 1, "flash": 3}[path] * model.config.num_hidden_layers
    assert all(call["attn_mask"] is None and call["is_causal"] for call in seen)


def test_s6_training_does_not_ignore_padding_on_the_left() -> None:
    # The original does: off by 2.7 to 9 standard deviations.
    layer = _layer().train()
    _, real = batch("left")
    hidden = torch.randn(3, real.shape[1], 64)
    out = forward_2(layer, hidden, real, _positions(hidden))[0]
    _judge("training", out, layer, hidden, real)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_s7_evaluation_softmax_is_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    seen = []
    softmax = Tensor.softmax

    def spy(scores: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(scores.dtype)
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(Tensor, "softmax", spy)
    layer = _layer().eval().to(dtype)
    hidden = torch.randn(2, 5, 64, dtype=dtype)
    mask = torch.zeros(5, 5).masked_fill(~causal_visible(5, 5), float("-inf")).to(dtype)
    out = forward_2(layer, hidden, mask.expand(2, 1, 5, 5), _positions(hidden))[0]
    assert seen == [torch.float32]
    assert out.dtype == dtype


def test_s7_evaluation_adds_an_explicit_mask() -> None:
    layer = _layer().eval()
    hidden = torch.randn(2, 5, 64)
    # A bias that is no mask at all moves the weights as additions before a softmax do.
    bias = torch.randn(2, 1, 5, 5).masked_fill(~causal_visible(5, 5), float("-inf"))
    _, weights, _ = forward_2(layer, hidden, bias, _positions(hidden), output_attentions=True)
    plain = bias.masked_fill(bias.isfinite(), 0.0)
    _, unmoved, _ = forward_2(layer, hidden, plain, _positions(hidden), output_attentions=True)
    want = (unmoved.log() + bias).softmax(-1)
    torch.testing.assert_close(weights, want)


@pytest.mark.parametrize("function", [forward, forward_2])
def test_s8_weights_are_returned_when_asked_for(function: types.FunctionType) -> None:
    layer = _layer().eval()
    _, real = batch("right")
    hidden = torch.randn(3, real.shape[1], 64)
    asked = function(layer, hidden, real, _positions(hidden), output_attentions=True)
    unasked = function(layer, hidden, real, _positions(hidden))
    assert unasked[1] is None
    weights = asked[1]
    assert weights.shape == (3, 4, real.shape[1], real.shape[1])
    rows = weights.transpose(1, 2)[real]
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    visible = oracle.causal_visible_keys(real).expand_as(weights)
    hidden_weights = weights.masked_fill(visible, 0.0).transpose(1, 2)[real]
    assert hidden_weights.abs().max() == 0.0
    torch.testing.assert_close(asked[0][real], unasked[0][real])


@pytest.mark.parametrize("function", [forward, forward_2])
def test_s9_cache_is_returned_and_reused(function: types.FunctionType) -> None:
    layer = _layer().eval()
    hidden = torch.randn(2, 9, 64)
    want, _, none = function(layer, hidden, None, _positions(hidden))
    assert none is None
    past, got = None, []
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        out, _, past = function(
            layer,
            hidden[:, start:stop],
            None,
            torch.arange(start, stop)[None].expand(2, -1),
            past,
            use_cache=True,
        )
        assert past[0].shape == (2, 2 if HAS_GQA else 4, stop, 16)
        got.append(out)
    torch.testing.assert_close(torch.cat(got, 1), want)


def test_s10_mask_preparation_hands_the_mask_through() -> None:
    mask = torch.tensor([[True, False]])
    assert _prepare_decoder_attention_mask(None, mask, (1, 2), torch.zeros(1, 2, 4), 0) is mask
    assert _prepare_decoder_attention_mask(None, None, (1, 2), torch.zeros(1, 2, 4), 0) is None


@until("4.35", "the mask preparation of LlamaModel")
def test_s10_flash_path_gets_the_raw_mask_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    model = build_model()
    ids, real = batch("left")
    truth = run_logits(model, ids, real.long())[real]
    with patched("flash"):
        layer = model.model.layers[0].self_attn
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        got = run_logits(model, ids, real.long())[real]
    assert seen[0].dim() == 2
    torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("function", [forward, forward_2])
def test_s11_returns_three_by_the_originals_signature(function: types.FunctionType) -> None:
    # Also on versions whose modules have lost their rotary table, and without position_ids.
    layer = _layer().eval()
    hidden = torch.randn(2, 5, 64)
    out, weights, past = function(layer, hidden)
    assert weights is None and past is None
    _judge("without position_ids", out, layer, hidden)


def test_s11_returns_what_the_decoder_layer_unpacks() -> None:
    seen = []
    model = build_model()
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    ids, real = batch("none")
    with patched("sdpa"):
        run_logits(model, ids, real.long())
    assert seen == [installed_era().returned]


@pytest.mark.skipif(not HAS_GQA, reason="grouped KV heads came with 4.31")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_s12_packed_path_serves_grouped_heads(kv_heads: int) -> None:
    layer = _layer("gqa", num_key_value_heads=kv_heads)
    _, real = batch("mixed")
    hidden = torch.randn(3, real.shape[1], 64)
    out = forward(layer, hidden, real, _positions(hidden))[0]
    _judge(f"{kv_heads} KV heads", out, layer, hidden, real)
