"""What a patched model returns has the form that its caller expects, with zeros at padding."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from packaging.version import Version
from torch import Tensor

import padless
from golden.models import (
    LAYERS,
    VERSION,
    VOCAB,
    batch,
    build_model,
    judge,
    run_logits,
    since,
    truth_logits,
    until,
)
from golden.steps import labels_of, said_by_padless, unpadding
from padless.unpadded import outputs as outputs_module

pytestmark = pytest.mark.case("patch")


def _shapes(value: Any) -> Any:
    """Describes nested outputs by their types and shapes; caches by their type."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: _shapes(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shapes(each) for each in value]
    return type(value).__name__


@pytest.mark.parametrize("caller", ["model", "body"])
@pytest.mark.parametrize("padding", ["none", "mixed"])
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_form_of_outputs(
    caller: str, padding: str, return_dict: bool, use_cache: bool, hidden: bool
) -> None:
    model = build_model()
    ids, real = batch(padding)
    options: dict[str, Any] = {"return_dict": return_dict, "use_cache": use_cache}
    if caller == "model":
        options["labels"] = labels_of(ids, real)
    called = model if caller == "model" else model.model

    def run() -> Any:
        return called(ids, attention_mask=real.long(), output_hidden_states=hidden, **options)

    stock = run()
    with unpadding(model):
        got = run()
    assert isinstance(got, tuple) is not return_dict
    assert _shapes(got) == _shapes(stock)
    if return_dict:
        assert isinstance(got, type(stock))


@pytest.mark.parametrize("source", ["return_dict", "torchscript"])
@until("4.54", "tuples by the config")
def test_tuples_that_the_config_asks_for(source: str) -> None:
    model = build_model()
    setattr(model.config, source, source == "torchscript")
    ids, real = batch("left")

    def run() -> Any:
        return model(ids, attention_mask=real.long(), labels=labels_of(ids, real))

    stock = run()
    with padless.patch(model):
        got = run()
    assert isinstance(stock, tuple) and isinstance(got, tuple)
    assert _shapes(got) == _shapes(stock)
    torch.testing.assert_close(got[1][real], stock[1][real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["left", "mixed"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_hidden_states_of_every_layer(padding: str, mode: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)

    def run() -> tuple[Tensor, ...]:
        out = model(ids, attention_mask=real.long(), output_hidden_states=True, return_dict=True)
        return out.hidden_states

    stock = run()
    with unpadding(model):
        got = run()
    assert len(got) == len(stock) == LAYERS + 1
    for mine, theirs in zip(got, stock, strict=True):
        torch.testing.assert_close(mine[real], theirs[real], atol=1e-4, rtol=1e-4)
        assert mine[~real].abs().sum() == 0.0


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attentions_take_the_stock_path_and_it_is_said_once(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Implementations without weights give none in newer versions, and the same none when patched.
    model = build_model().train(mode == "train")
    if Version("4.48") <= VERSION:
        model.config._attn_implementation = "eager"
    ids, real = batch("left")

    def run() -> Any:
        return model(ids, attention_mask=real.long(), output_attentions=True, return_dict=True)

    stock = run()
    assert stock.attentions[0].shape == (3, 4, 13, 13)
    with caplog.at_level(logging.WARNING, logger="padless"), padless.patch(model) as handle:
        got = run()
        assert torch.equal(run().logits, stock.logits)
        assert handle.report().stock == {"output_attentions": 2}
    assert torch.equal(got.logits, stock.logits)
    for mine, theirs in zip(got.attentions, stock.attentions, strict=True):
        assert torch.equal(mine, theirs)
    assert [line for line in said_by_padless(caplog) if "output_attentions" in line] == [
        "output_attentions takes transformers' own path, padding and all"
    ]


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_sequence_classifier(padding: str, return_dict: bool) -> None:
    body = build_model()
    # The class keeps the body under the same name, whatever else it has.
    config = copy.deepcopy(body.config)
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(body.model.state_dict())
    ids, real = batch(padding)
    ids = ids.masked_fill(~real, config.pad_token_id)
    labels = torch.tensor([0, 2, 1])

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(ids, attention_mask=real.long(), labels=labels, return_dict=return_dict)
        out[0].backward()
        weight = model.model.layers[0].self_attn.q_proj.weight.grad
        return [out[0].detach(), out[1].detach(), weight.clone()]

    stock = run()
    with unpadding(model) as handle:
        got = run()
        assert handle.report().skipped_tokens == int((~real).sum())
    for mine, theirs in zip(got, stock, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


READERS: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "index": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "get": lambda out: out.get("logits"),
    "to_tuple": lambda out: out.to_tuple()[1],
    "dict": lambda out: dict(out)["logits"],
    "star": lambda out: {**out}["logits"],
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "copy": lambda out: copy.copy(out).logits,
    "deepcopy": lambda out: copy.deepcopy(out).logits,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits,
    "rebuilt": lambda out: type(out)({**out}).logits,
    "pytree": lambda out: pytree.tree_unflatten(*reversed(pytree.tree_flatten(out)))["logits"],
}


@pytest.mark.parametrize("reader", READERS)
def test_logits_are_padded_however_they_are_read(reader: str) -> None:
    if reader == "pytree" and Version("4.33") > VERSION:
        pytest.skip("outputs are nodes of a pytree since 4.33")
    model = build_model()
    ids, real = batch("left")
    with unpadding(model), torch.no_grad():
        out = model(ids, attention_mask=real.long(), labels=labels_of(ids, real), return_dict=True)
        logits = READERS[reader](out)
    stock = run_logits(model, ids, real.long())
    assert logits.shape == (3, 13, VOCAB) and logits[~real].abs().sum() == 0.0
    judge(reader, logits[real], stock[real], truth_logits(model, ids, real)[real])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_reading_the_loss_alone_pads_nothing(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = []
    pad = outputs_module._pad
    monkeypatch.setattr(outputs_module, "_pad", lambda *a: padded.append(a[0].shape) or pad(*a))
    model = build_model()
    ids, real = batch(padding)
    with unpadding(model):
        out = model(ids, attention_mask=real.long(), labels=labels_of(ids, real), return_dict=True)
        for read in (lambda: out.loss, lambda: out["loss"], lambda: out[0], lambda: out.keys()):
            read()
        assert "logits" in out and len(out) >= 2
        with contextlib.suppress(AttributeError):
            out.no_such_thing  # noqa: B018
        if padding == "left":
            assert padded == []
        else:
            # Nothing to pad: another view of the same numbers.
            assert out.logits.shape == (3, 13, VOCAB)


@since("4.33", "outputs as nodes of a pytree")
def test_outputs_are_ordinary_once_read() -> None:
    model = build_model()
    ids, real = batch("left")
    stock = model(ids, attention_mask=real.long(), return_dict=True)
    with unpadding(model):
        out = model(ids, attention_mask=real.long(), return_dict=True)
    assert out.logits.shape == stock.logits.shape
    assert type(out.past_key_values) is type(stock.past_key_values)
    assert type(out) is type(stock) and vars(out).keys() == vars(stock).keys()
