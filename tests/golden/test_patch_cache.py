"""Caches that a patched model fills are the unpatched one's, and both go on from them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LlamaForCausalLM

import padless
from golden.models import HEADS, LAYERS, VERSION, batch, build_model, judge, since, truth_logits

pytestmark = pytest.mark.case("patch")

STEPS = 6
KINDS = [
    "native",
    pytest.param("dynamic", marks=since("4.36", "DynamicCache")),
    # 4.38 to 4.40 hang the static cache on the layers: generating covers it there.
    pytest.param("static", marks=since("4.41", "StaticCache as an argument")),
]
# transformers raises IndexError there, before any attention layer is called.
NO_CHUNK_BEHIND_LEFT_PADDING = Version("4.36") <= VERSION < Version("4.38")


def _new_cache(kind: str, model: LlamaForCausalLM, rows: int) -> Any:
    if kind == "native":
        return None
    if kind == "dynamic":
        return transformers.DynamicCache()
    known = inspect.signature(transformers.StaticCache.__init__).parameters
    if "kwargs" in known and "config" not in known:
        # 4.54 and 4.55 hand everything on to Cache.
        known = inspect.signature(transformers.Cache.__init__).parameters
    offered = {
        "config": model.config,
        "batch_size": rows,
        "max_batch_size": rows,
        "max_cache_len": 32,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return transformers.StaticCache(**{k: v for k, v in offered.items() if k in known})


def _forward(model: LlamaForCausalLM, ids: Tensor, real: Tensor, past: Any, start: int = 0) -> Any:
    """Runs what stands behind `start`; `real` goes over what stands in front too."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    options = {}
    if type(past).__name__ == "StaticCache" and Version("5.4") > VERSION:
        options["cache_position"] = torch.arange(start, real.shape[1])
    return model(
        input_ids=ids,
        attention_mask=real.long(),
        position_ids=positions[:, start:],
        past_key_values=past,
        use_cache=True,
        return_dict=True,
        **options,
    )


def _go_on(model: LlamaForCausalLM, first: Tensor, past: Any, real: Tensor) -> Tensor:
    """Decodes greedily from a cache, token by token."""
    tokens = [first]
    for _ in range(STEPS):
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
        out = _forward(model, tokens[-1], real, past, real.shape[1] - 1)
        past = out.past_key_values
        tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def keys_and_values(past: Any) -> list[Tensor]:
    """Reads keys and values of all layers, `(batch, heads, slots, head_dim)` each."""
    if hasattr(past, "layers"):
        return [each for layer in past.layers for each in (layer.keys, layer.values)]
    if hasattr(past, "key_cache"):
        return [
            each for pair in zip(past.key_cache, past.value_cache, strict=True) for each in pair
        ]
    return [each for pair in past for each in pair]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_both_models_go_on_from_the_cache(kind: str, heads: str, padding: str) -> None:
    model = build_model(heads)
    ids, real = batch(padding)
    out = _forward(model, ids, real, _new_cache(kind, model, 3))
    first = out.logits[:, -1:].argmax(-1)
    stored = [each.clone() for each in keys_and_values(out.past_key_values)]
    want = _go_on(model, first, out.past_key_values, real)

    got = {}
    for goes_on in ("unpatched", "patched"):
        with padless.patch(model) as handle:
            out = _forward(model, ids, real, _new_cache(kind, model, 3))
            assert handle.report().forwards == 1
            mine = [each.clone() for each in keys_and_values(out.past_key_values)]
            if goes_on == "patched":
                got[goes_on] = _go_on(model, first, out.past_key_values, real)
                assert handle.report().stock == {"a call behind a cache": STEPS}
        if goes_on == "unpatched":
            got[goes_on] = _go_on(model, first, out.past_key_values, real)
        assert len(mine) == 2 * LAYERS
        for a, b in zip(mine, stored, strict=True):
            assert a.shape == b.shape
            a, b = (x.transpose(1, 2)[:, : real.shape[1]] for x in (a, b))
            torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-4)
            assert a[~real].abs().sum() == 0.0
    assert torch.equal(got["unpatched"], want)
    assert torch.equal(got["patched"], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_chunk_behind_a_cache(kind: str, padding: str) -> None:
    if NO_CHUNK_BEHIND_LEFT_PADDING and padding == "left":
        pytest.skip("4.36 and 4.37 take no chunk behind left padding")
    model = build_model()
    ids, real = batch(padding, seqlen=20)
    real[2, 10:] = True  # So that the chunk has no padding of its own.

    def run() -> Tensor:
        past = _forward(model, ids[:, :13], real[:, :13], _new_cache(kind, model, 3))
        behind = _forward(model, ids[:, 13:], real, past.past_key_values, 13)
        return torch.cat([past.logits, behind.logits], 1)[real]

    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    truth = truth_logits(model, ids, real, position_ids=positions)[real]
    stock = run()
    with padless.patch(model) as handle:
        got = run()
        assert handle.report().forwards == 1
    judge("chunk", got, stock, truth)


def _generate(model: LlamaForCausalLM, padding: str, **options: Any) -> Tensor:
    ids, real = batch(padding)
    return model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"num_beams": 3}, id="beam"),
    ],
)
def test_generate_gives_the_same_tokens(heads: str, padding: str, options: dict[str, Any]) -> None:
    model = build_model(heads)
    # Unpatched 4.40 without a cache lets the tokens of a padded prompt see those behind them.
    want = _generate(model, padding, **({} if "use_cache" in options else options))
    with padless.patch(model) as handle:
        got = _generate(model, padding, **options)
        assert handle.report().forwards == (12 if "use_cache" in options else 1)
    assert torch.equal(got, want)


@since("4.38", "StaticCache")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_with_a_static_cache_equals_dynamic(padding: str) -> None:
    # With a static cache and no padding, 4.40 unpatched attends to empty slots; and 4.38 to 4.40
    # leave the cache on the layers, so that those are another model's.
    is_on_layers = Version("4.41") > VERSION
    options = {"cache_implementation": "static"}
    want = _generate(build_model(), padding, **(options if is_on_layers else {}))
    model = build_model()
    with padless.patch(model) as handle:
        got = _generate(model, padding, **options)
        report = handle.report()
    if is_on_layers:
        assert report.stock == {"a static cache on the layers": 12}
    # Newer versions hand over a 4D mask for the prompt, which the stock path then serves.
    assert report.forwards + sum(report.stock.values()) == 12
    assert torch.equal(got, want)
