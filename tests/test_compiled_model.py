"""A patched model under torch.compile: no graph break in a layer, no graph for a new length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import padless

WARM_UP, SHAPES = 4, 50
Batch = dict[str, Any]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _batches(count: int) -> Iterator[Batch]:
    """Draws padded batches of four rows, each batch of other lengths."""
    lengths = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = [lengths.randint(2, 30) for _ in range(4)]
        ids = torch.randint(3, 32, (4, max(rows)), generator=generator)
        mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
        yield {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "labels": ids.masked_fill(~mask, -100),
        }


def _loss_and_gradient(model: Any, weight: Tensor, batch: Batch) -> tuple[float, Tensor]:
    weight.grad = None
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), weight.grad


def _compile_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def _compile_all(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("compiled", [_compile_layers, _compile_all])
def test_new_lengths_make_no_new_graph(compiled: Callable[[Any], Any]) -> None:
    stock, model = _model(), _model()
    handle = padless.patch(model)
    run = compiled(model)
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (stock, model)]
    graphs = 0
    for number, batch in enumerate(_batches(WARM_UP + SHAPES)):
        if number == WARM_UP:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs > 0
        loss, gradient = _loss_and_gradient(run, weights[1], batch)
        expected_loss, expected = _loss_and_gradient(stock, weights[0], batch)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    report = handle.report()
    assert report.forwards == report.compiled_forwards == WARM_UP + SHAPES
    assert report.stock == {}


def test_whole_model_breaks_at_its_doors_alone() -> None:
    model = _model()
    padless.patch(model)
    run = _compile_all(model)
    for batch in _batches(WARM_UP):
        run(**batch)
    breaks = [
        reason for reason in counters["graph_break"] if "torch.compiler.disable" not in reason
    ]
    assert breaks == []
