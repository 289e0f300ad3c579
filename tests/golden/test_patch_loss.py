"""The loss of a patched model is the unpatched one's, whatever the labels are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import padless
from golden.documents import IGNORED
from golden.models import PADDINGS, VERSION, VOCAB, batch, build_model, judge, since
from golden.steps import labels_of, run_step, said_by_padless, truth_step, unpadding

pytestmark = pytest.mark.case("patch")

KEEP = "logits_to_keep" if Version("4.49") <= VERSION else "num_logits_to_keep"


def _loss(model: torch.nn.Module, ids: Tensor, real: Tensor, labels: Tensor, **options: Any) -> Any:
    out = model(ids, attention_mask=real.long(), labels=labels, return_dict=True, **options)
    return out.loss


@pytest.mark.parametrize("padding", ["right", "left", "mixed"])
def test_some_labels_ignored(padding: str) -> None:
    # A prompt without labels, and one row without any.
    model = build_model().train()
    ids, real = batch(padding)
    labels = labels_of(ids, real)
    labels[0, :7] = labels[2] = IGNORED
    stock = run_step(model, ids, real.long(), labels=labels)
    truth = truth_step(model, ids, real, labels)
    with unpadding(model):
        got = run_step(model, ids, real.long(), labels=labels)
    judge("loss", got.loss[None], stock.loss[None], truth.loss[None])
    for name in got.gradients:
        judge(name, got.gradients[name], stock.gradients[name], truth.gradients[name])


def _at_padding(ids: Tensor, real: Tensor) -> Tensor:
    # What a collator makes that copies ids: the pad token is a label.
    return ids.clone()


def _behind_padding(ids: Tensor, real: Tensor) -> Tensor:
    return ids.masked_fill(~real, IGNORED)


@pytest.mark.parametrize(
    ("padding", "make"),
    [
        pytest.param("right", _at_padding, id="at padding on the right"),
        pytest.param("left", _at_padding, id="at padding on the left"),
        pytest.param("left", _behind_padding, id="at the first token behind padding"),
        pytest.param("mixed", _behind_padding, id="behind padding, mixed"),
    ],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_labels_that_need_padding_take_the_stock_path(
    padding: str, make: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    labels = make(ids, real)
    stock = run_step(model, ids, real.long(), labels=labels)
    with padless.patch(model) as handle:
        got = [run_step(model, ids, real.long(), labels=labels) for _ in range(2)]
        report = handle.report()
    assert report.forwards == 0 and list(report.stock.values()) == [2]
    for step in got:
        assert torch.equal(step.loss, stock.loss) and torch.equal(step.logits, stock.logits)
        assert all(torch.equal(step.gradients[n], g) for n, g in stock.gradients.items())
    (line,) = said_by_padless(caplog)
    assert line.startswith("a label that is compared with an output at padding")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_labels_behind_right_padding_only_are_served(padding: str) -> None:
    # On the right no output of padding is asked for, once padding itself has no label.
    model = build_model()
    ids, real = batch(padding)
    labels = ids.masked_fill(~real, IGNORED)
    stock = _loss(model, ids, real, labels)
    with padless.patch(model) as handle:
        got = _loss(model, ids, real, labels)
        assert handle.report().forwards == int(padding == "right")
    torch.testing.assert_close(got, stock)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_no_row_predicts_the_first_token_of_the_next(padding: str) -> None:
    # Planted: every row begins with what the row before makes most likely. A flat row that forgot
    # its rows would be rewarded for it.
    model = build_model()
    ids, real = batch(padding)
    with torch.no_grad():
        logits = model(ids, attention_mask=real.long(), return_dict=True).logits
    for row in range(1, 3):
        ids[row, 0] = int(logits[row - 1, int(real[row - 1].sum()) - 1].argmax())
    labels = ids.masked_fill(~real, IGNORED)
    truth = truth_step(model, ids, real, labels)
    stock = run_step(model, ids, real.long(), labels=labels)
    with unpadding(model):
        got = run_step(model, ids, real.long(), labels=labels)
    judge("loss", got.loss[None], stock.loss[None], truth.loss[None])
    name = "lm_head.weight"
    judge(name, got.gradients[name], stock.gradients[name], truth.gradients[name])


@since("4.46", "num_items_in_batch")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("count", [pytest.param(100, id="int"), torch.tensor(100)])
def test_num_items_in_batch(padding: str, count: Any) -> None:
    model = build_model().train()
    ids, real = batch(padding)
    labels = labels_of(ids, real)
    stock = _loss(model, ids, real, labels, num_items_in_batch=count)
    with unpadding(model):
        got = _loss(model, ids, real, labels, num_items_in_batch=count)
    mean = _loss(model, ids, real, labels)
    torch.testing.assert_close(got, stock)
    assert (got - mean).abs() > 0.1


def _takes_shift_labels() -> bool:
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        return False
    code = ForCausalLMLoss.__code__
    return "shift_labels" in code.co_varnames[: code.co_argcount]


@pytest.mark.skipif(not _takes_shift_labels(), reason="shift_labels came with 4.51")
@pytest.mark.parametrize(
    ("padding", "is_bound"),
    [*((padding, False) for padding in PADDINGS), ("right", True), ("mixed", True)],
)
def test_shift_labels(padding: str, is_bound: bool) -> None:
    model = build_model().train()
    ids, real = batch(padding)
    labels = labels_of(ids, real)
    # Other than labels shifted by one, so that a model that looks at labels is found out.
    shifted = (ids * 7 % VOCAB).masked_fill(~real, 5 if is_bound else IGNORED)
    shifted[:, 3] = shifted[:, 3].masked_fill(~real[:, 3], 5 if is_bound else IGNORED)
    stock = _loss(model, ids, real, labels, shift_labels=shifted)
    with padless.patch(model) as handle:
        got = _loss(model, ids, real, labels, shift_labels=shifted)
        assert handle.report().forwards == int(not is_bound)
    torch.testing.assert_close(
        got, stock, rtol=0 if is_bound else None, atol=0 if is_bound else None
    )
    assert (got - _loss(model, ids, real, labels)).abs() > 1e-3


@since("4.45", "num_logits_to_keep")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kept", [1, 5, 0, pytest.param("tensor", marks=since("4.49", "a tensor"))])
def test_logits_to_keep(padding: str, kept: Any) -> None:
    model = build_model()
    ids, real = batch(padding)
    options = {KEEP: torch.tensor([2, 7, 12]) if kept == "tensor" else kept}

    def run() -> Tensor:
        return model(ids, attention_mask=real.long(), return_dict=True, **options).logits

    stock = run()
    with unpadding(model) as handle:
        got = run()
        assert handle.report().skipped_tokens == int((~real).sum())
    assert got.shape == stock.shape
    at = real[:, options[KEEP]] if kept == "tensor" else real[:, -kept:]
    torch.testing.assert_close(got[at], stock[at], atol=1e-4, rtol=1e-4)
    assert got[~at].abs().sum() == 0.0


@since("4.45", "num_logits_to_keep")
@pytest.mark.parametrize("labels_at", ["real tokens", "padding"])
def test_logits_to_keep_with_labels(labels_at: str) -> None:
    # All of them, so that labels fit: what padding predicts counts as it does without a patch.
    model = build_model().train()
    ids, real = batch("mixed")
    labels = labels_of(ids, real) if labels_at == "real tokens" else ids
    stock = _loss(model, ids, real, labels, **{KEEP: ids.shape[1]})
    with padless.patch(model):
        got = _loss(model, ids, real, labels, **{KEEP: ids.shape[1]})
    torch.testing.assert_close(got, stock)


@since("4.47", "cu_seq_lens through the model")
def test_logits_to_keep_with_labels_and_boundaries_is_refused() -> None:
    # The stock path, which such labels take, would let the documents see each other.
    model = build_model()
    ids, _ = batch("none")
    bounds = torch.tensor([0, 13, 20, 26, 39], dtype=torch.int32)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, KEEP: 13}
    with padless.patch(model), pytest.raises(padless.UnsupportedError, match="a loss of some"):
        model(ids, labels=ids, **options)
