"""What a LLaMA's configuration may ask of its attention, compared with the unpatched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version

from golden.models import PATHS, VERSION, batch, both, build_model, run_logits, since, until

# A length beyond the original one, so that scaling by length comes into play.
_ROPE = {
    "linear": ({"factor": 2.0}, "4.31"),
    "dynamic": ({"factor": 2.0}, "4.31"),
    "yarn": ({"factor": 2.0, "original_max_position_embeddings": 16}, "4.45"),
    "longrope": (
        {
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
        },
        "4.45",
    ),
    "proportional": ({"partial_rotary_factor": 0.5, "factor": 2.0}, "5.10"),
    "llama3": (
        {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "4.43",
    ),
}


def _assert_same(path: str, seqlen: int = 13, **config: Any) -> None:
    model = build_model(**config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    for padding in ("none", "right", "left"):
        ids, real = batch(padding, seqlen=seqlen)
        for training in (False, True):
            model.train(training)
            stock, got = both(
                path,
                lambda i=ids, r=real: run_logits(model, i, r.long(), use_cache=False)[r],
            )
            torch.testing.assert_close(got, stock, atol=2e-4, rtol=1e-4)


def _rope(kind: str) -> dict[str, Any]:
    options = dict(_ROPE[kind][0])
    if Version("5.0") <= VERSION:
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}
    key = "rope_type" if Version("4.43") <= VERSION else "type"
    return {"rope_scaling": {key: kind, **options}}


@pytest.mark.case("config")
@pytest.mark.parametrize("path", PATHS)
@since("4.34", "attention_bias")
def test_attention_bias(path: str) -> None:
    _assert_same(path, attention_bias=True)


@pytest.mark.case("config")
@pytest.mark.parametrize("path", PATHS)
@since("4.31", "pretraining_tp")
@until("4.47", "pretraining_tp")
def test_pretraining_tp(path: str) -> None:
    _assert_same(path, pretraining_tp=2)


@pytest.mark.case("config")
@pytest.mark.parametrize("path", PATHS)
@since("4.46", "head_dim")
def test_head_dim_that_is_not_hidden_size_over_heads(path: str) -> None:
    _assert_same(path, head_dim=24)


@pytest.mark.case("rope")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=since(_ROPE[k][1], f"rope type {k}")) for k in _ROPE],
)
def test_rope_scaling(path: str, kind: str) -> None:
    _assert_same(path, seqlen=24, max_position_embeddings=16, **_rope(kind))


@pytest.mark.case("rope")
@pytest.mark.parametrize("path", PATHS)
def test_rope_without_a_table_handed_over(path: str) -> None:
    # Called by the original's signature, the layer finds its own table: dynamic, far positions.
    from padless.llama import forward, forward_2

    if Version("4.31") > VERSION:
        pytest.skip("rope scaling came with 4.31")
    model = build_model(max_position_embeddings=16, **_rope("dynamic"))
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(2, 24, 64)
    seen = {}
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs, out=output[0]), with_kwargs=True
    )
    model.model(inputs_embeds=hidden, use_cache=False)
    function = {"sdpa": forward_2, "flash": forward}[path]
    got = function(layer, seen["hidden_states"], None)[0]
    torch.testing.assert_close(got, seen["out"], atol=2e-4, rtol=1e-4)
