"""One training step of a model, of its documents run alone, and of its float64 truth."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

import padless
from golden.documents import IGNORED, numbers_of
from golden.models import LAYERS, batch, judge, oracle_logits


class Step(NamedTuple):
    """What a step computed.

    Attributes:
        loss: a scalar.
        logits: `(batch, seqlen, vocab)`.
        gradients: by parameter.
    """

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


@contextlib.contextmanager
def unpadding(model: torch.nn.Module) -> Iterator[padless.PatchHandle]:
    """Patches a model and checks on leaving that it ran on real tokens, and never otherwise."""
    with padless.patch(model) as handle:
        yield handle
        report = handle.report()
        assert report.forwards, "no forward ran on real tokens"
        assert not report.stock, report.stock
        assert len(report.layers) == LAYERS, report.layers


def said_by_padless(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of padless so far; transformers has its own."""
    records = [record for record in caplog.records if record.name == "padless"]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def labels_of(ids: Tensor, real: Tensor) -> Tensor:
    """Labels that depend on real tokens only: none at padding, none behind padding on the left."""
    labels = ids.masked_fill(~real, IGNORED)
    labels[:, 1:] = labels[:, 1:].masked_fill(~real[:, :-1], IGNORED)
    return labels


def run_step(model: torch.nn.Module, ids: Tensor, mask: Tensor | None, **options: Any) -> Step:
    """Runs forward and backward; ids may be embeddings, `(batch, seqlen, hidden_size)`."""
    source = "inputs_embeds" if ids.is_floating_point() else "input_ids"
    model.zero_grad(set_to_none=True)
    options = {"return_dict": True, **options, source: ids, "attention_mask": mask}
    out = model(**options)
    out.loss.backward()
    return Step(out.loss.detach(), out.logits.detach(), _gradients(model))


def documents_step(
    model: torch.nn.Module, ids: Tensor, documents: Tensor, labels: Tensor, **options: Any
) -> Step:
    """Runs each document by itself, as one batch that shares a loss.

    Args:
        model: an unpatched model.
        ids: `(batch, seqlen)`.
        documents: `(batch, seqlen)`, a number for each document, -1 at padding.
        labels: `(batch, seqlen)`, none at the first token of a document.
        **options: for the model.
    """
    model.zero_grad(set_to_none=True)
    logits = torch.zeros(*ids.shape, model.config.vocab_size)
    total = torch.zeros(())
    for number in numbers_of(documents):
        at = documents == number
        out = model(input_ids=ids[at][None], return_dict=True, **options).logits
        total = total + _summed(out, labels[at][None])
        logits[at] = out[0].detach()
    loss = total / (labels != IGNORED).sum()
    loss.backward()
    return Step(loss.detach(), logits, _gradients(model))


def truth_step(
    model: LlamaForCausalLM, ids: Tensor, real: Tensor, labels: Tensor, **options: Any
) -> Step:
    """Computes the step in float64 by the oracle."""
    weights = {
        name: weight.detach().double().requires_grad_()
        for name, weight in model.state_dict().items()
        if weight.dim() and "inv_freq" not in name
    }
    logits = oracle_logits(model, weights, ids, real, **options)
    loss = _summed(logits, labels) / (labels[:, 1:] != IGNORED).sum()
    loss.backward()
    gradients = {name: w.grad for name, w in weights.items() if w.grad is not None}
    return Step(loss.detach(), logits.detach(), gradients)


def judge_step(got: Step, stock: Step, truth: Step, real: Tensor) -> None:
    """Asserts that loss, logits of real tokens and every gradient are within the stock's error."""
    judge("loss", got.loss[None], stock.loss[None], truth.loss[None])
    judge("logits", got.logits[real], stock.logits[real], truth.logits[real])
    assert got.gradients.keys() == stock.gradients.keys() == truth.gradients.keys()
    for name, gradient in got.gradients.items():
        judge(f"gradient of {name}", gradient, stock.gradients[name], truth.gradients[name])
    assert got.logits[~real].abs().sum() == 0.0, "logits at padding are not zero"


def step_of(model: torch.nn.Module, padding: str = "left", **options: Any) -> Step:
    """Runs a step on a batch of this padding, with labels that depend on real tokens only."""
    ids, real = batch(padding)
    return run_step(model, ids, real.long(), labels=labels_of(ids, real), **options)


def judge_step_of(model: LlamaForCausalLM, padding: str, got: Step, stock: Step) -> None:
    """Judges what `step_of` computed."""
    ids, real = batch(padding)
    judge_step(got, stock, truth_step(model, ids, real, labels_of(ids, real)), real)


def assert_steps_close(got: Step, stock: Step) -> None:
    """Asserts that losses and gradients differ in roundings, where there is no truth to ask."""
    torch.testing.assert_close(got.loss, stock.loss)
    assert got.gradients.keys() == stock.gradients.keys() and got.gradients
    for name, gradient in stock.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got.gradients[name], gradient, rtol=0.0, atol=1e-5 * scale)


def steps_equal(a: Step, b: Step) -> bool:
    """Whether loss, logits and gradients are equal, bit by bit."""
    gradients = (torch.equal(a.gradients[name], g) for name, g in b.gradients.items())
    return torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits) and all(gradients)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
