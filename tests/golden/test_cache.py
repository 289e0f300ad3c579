"""Caches of every kind: prefill, a chunk behind it, and decoding, on padded batches."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import LlamaForCausalLM

from golden.models import (
    PATHS,
    VERSION,
    batch,
    both,
    build_model,
    judge,
    since,
    truth_logits,
)

pytestmark = pytest.mark.case("cache")

# Prefill 13, then a chunk of 7 behind it, then two single tokens.
CHUNKED = ((0, 13), (13, 20), (20, 21), (21, 22))
SINGLE = ((0, 13), *((i, i + 1) for i in range(13, 22)))
# The model's own mask preparation raises IndexError there, before any attention layer is called.
NO_CHUNK_BEHIND_LEFT_PADDING = Version("4.36") <= VERSION < Version("4.38")


def _new_cache(kind: str, model: LlamaForCausalLM, rows: int) -> Any:
    if kind == "native":
        return None
    import transformers

    if kind == "dynamic":
        return transformers.DynamicCache()
    known = inspect.signature(transformers.StaticCache.__init__).parameters
    offered = {
        "config": model.config,
        "batch_size": rows,
        "max_batch_size": rows,
        "max_cache_len": 32,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    if "kwargs" in known and "config" not in known:
        # 4.54 and 4.55 hand everything on to Cache.
        known = inspect.signature(transformers.Cache.__init__).parameters
    return transformers.StaticCache(**{k: v for k, v in offered.items() if k in known})


def _positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _stepwise(model: LlamaForCausalLM, ids: Tensor, real: Tensor, kind: str) -> Tensor:
    single = NO_CHUNK_BEHIND_LEFT_PADDING and not real.all()
    past, got = _new_cache(kind, model, ids.shape[0]), []
    positions = _positions(real)
    for start, stop in SINGLE if single else CHUNKED:
        options = {}
        if kind == "static" and Version("5.4") > VERSION:
            options["cache_position"] = torch.arange(start, stop)
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=real[:, :stop].long(),
            position_ids=positions[:, start:stop],
            past_key_values=past,
            use_cache=True,
            return_dict=True,
            **options,
        )
        past = out.past_key_values
        got.append(out.logits)
    return torch.cat(got, 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "kind",
    [
        "native",
        pytest.param("dynamic", marks=since("4.36", "DynamicCache")),
        # 4.38 to 4.40 hang the static cache on the layers: test_generation covers it there.
        pytest.param("static", marks=since("4.41", "StaticCache as an argument")),
    ],
)
@torch.no_grad()
def test_steps_equal_one_forward(path: str, mode: str, padding: str, kind: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding, seqlen=CHUNKED[-1][1])
    if padding == "left":
        # All of row 2's prompt but its last three tokens is padding, and the rest is decoded.
        real = real.clone()
        real[2, 10:] = True
    truth = truth_logits(model, ids, real, position_ids=_positions(real))[real]
    stock, got = both(path, lambda: _stepwise(model, ids, real, kind)[real])
    judge(f"{kind} cache", got, stock, truth)


@since("4.41", "StaticCache as an argument")
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_static_cache_prefill_without_mask(path: str) -> None:
    # From 5.14 on no mask at all arrives here, though the cache holds more slots than tokens.
    model = build_model()
    ids, real = batch("none")
    options = {}
    if Version("5.4") > VERSION:
        options["cache_position"] = torch.arange(ids.shape[1])

    def run() -> Tensor:
        cache = _new_cache("static", model, ids.shape[0])
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits

    stock, got = both(path, run)
    judge("static prefill", got, stock, truth_logits(model, ids, real))
