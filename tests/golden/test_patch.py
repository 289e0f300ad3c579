"""A patched model computes what the unpatched one computes, and only on real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden.models import (
    HAS_GQA,
    HEADS,
    PADDINGS,
    VOCAB,
    batch,
    build_model,
    judge,
    oracle_logits,
    run_logits,
    truth_logits,
)
from golden.steps import Step, judge_step, labels_of, run_step, steps_equal, truth_step, unpadding
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("patch")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_logits_and_gradients(heads: str, mode: str, padding: str) -> None:
    model = build_model(heads).train(mode == "train")
    ids, real = batch(padding)
    labels = labels_of(ids, real)
    stock = run_step(model, ids, real.long(), labels=labels)
    with unpadding(model) as handle:
        got = run_step(model, ids, real.long(), labels=labels)
        report = handle.report()
    judge_step(got, stock, truth_step(model, ids, real, labels), real)
    assert report.computed_tokens == int(real.sum())
    assert report.skipped_tokens == int((~real).sum())


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "bool": lambda real: real,
    "int32": lambda real: real.int(),
    "uint8": lambda real: real.to(torch.uint8),
    "all ones": lambda real: torch.ones_like(real).long(),
    "none": lambda real: None,
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_kind(padding: str, mask: str) -> None:
    model = build_model()
    ids, real = batch(padding)
    # Without a mask, or by one of ones, the padding of the ids is as real as any token.
    seen = real if mask not in ("all ones", "none") else torch.ones_like(real)
    stock = run_logits(model, ids, seen.long())
    with unpadding(model) as handle:
        got = run_logits(model, ids, MASKS[mask](real))
        assert handle.report().computed_tokens == int(seen.sum())
    judge(mask, got[seen], stock[seen], truth_logits(model, ids, seen)[seen])


@pytest.mark.parametrize("padding", PADDINGS)
def test_embeddings_in_place_of_ids(padding: str) -> None:
    model = build_model().train()
    ids, real = batch(padding)
    labels = labels_of(ids, real)

    def run() -> tuple[Any, Tensor]:
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        step = run_step(model, embeds, real.long(), labels=labels)
        assert embeds.grad is not None
        return step, embeds.grad

    truth = truth_step(model, ids, real, labels)
    truth.gradients.pop("model.embed_tokens.weight")
    stock, stock_gradient = run()
    with unpadding(model):
        got, gradient = run()
    judge_step(got, stock, truth, real)
    assert gradient.shape == (*ids.shape, 64)
    torch.testing.assert_close(gradient, stock_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_body_by_itself(padding: str, mode: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    weights = {k: w.detach().double() for k, w in model.state_dict().items() if w.dim()}
    weights["lm_head.weight"] = torch.eye(64).double()
    truth = oracle_logits(model, weights, ids, real)

    def run() -> Tensor:
        return model.model(ids, attention_mask=real.long(), return_dict=True).last_hidden_state

    stock = run()
    with unpadding(model):
        got = run()
    judge("last_hidden_state", got[real], stock[real], truth[real])
    assert got[~real].abs().sum() == 0.0


@pytest.mark.parametrize("caller", ["model", "body"])
def test_arguments_by_position(caller: str) -> None:
    model = build_model()
    called = model if caller == "model" else model.model
    ids, real = batch("left")
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    stock = called(ids, real.long(), positions)[0][real]
    with unpadding(model) as handle:
        got = called(ids, real.long(), positions)[0][real]
        assert handle.report().skipped_tokens == int((~real).sum())
    torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_one_row_and_one_token(rows: int, padding: str) -> None:
    model = build_model()
    ids, real = batch(padding)
    parts = [(slice(rows), slice(None)), (slice(rows), slice(-1, None)), (slice(1, 2), slice(None))]
    for part in parts:
        some, seen = ids[part], real[part]
        stock = run_logits(model, some, seen.long())
        with unpadding(model):
            got = run_logits(model, some, seen.long())
        judge("logits", got[seen], stock[seen], truth_logits(model, some, seen)[seen])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_padding_between_real_tokens(mode: str) -> None:
    # Positions go on over it: by slots, where nobody gives others.
    model = build_model().train(mode == "train")
    ids, real = batch("none")
    real[0, 4:8] = real[2, 1] = real[2, 11] = False
    labels = labels_of(ids, real)
    stock = run_step(model, ids, real.long(), labels=labels)
    with unpadding(model):
        got = run_step(model, ids, real.long(), labels=labels)
    judge_step(got, stock, truth_step(model, ids, real, labels), real)


def test_wider_padding_changes_no_bit() -> None:
    # What is computed is the same row of real tokens, however wide the rectangle around it was.
    model = build_model().train()
    ids, real = batch("right")
    labels = labels_of(ids, real)

    def run(width: int) -> Step:
        wide = (0, width - ids.shape[1])
        step = run_step(
            model,
            F.pad(ids, wide),
            F.pad(real.long(), wide),
            labels=F.pad(labels, wide, value=-100),
        )
        return step._replace(logits=step.logits[:, : ids.shape[1]])

    with unpadding(model):
        assert steps_equal(run(13), run(40))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_row_of_padding_is_an_empty_sequence(mode: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch("left")
    kept = run_logits(model, ids[1:], real[1:].long())
    real[0] = False
    labels = labels_of(ids, real)
    with unpadding(model) as handle:
        got = run_step(model, ids, real.long(), labels=labels)
        assert handle.report().computed_tokens == int(real.sum())
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())
    assert got.loss.isfinite() and got.logits[0].abs().sum() == 0.0
    judge("other rows", got.logits[real], kept[real[1:]], truth_logits(model, ids, real)[real])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_changing_a_token_changes_its_successors_alone(padding: str, mode: str) -> None:
    model = build_model().train(mode == "train")
    ids, real = batch(padding)
    with unpadding(model):
        result = perturbation_probe(
            lambda changed: run_logits(model, changed, real.long()), ids, real, vocab_size=VOCAB
        )
    assert result.passed, str(result)


@pytest.mark.skipif(not HAS_GQA, reason="grouped KV heads came with 4.31")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_number_of_kv_heads(kv_heads: int) -> None:
    model = build_model("gqa", num_key_value_heads=kv_heads)
    ids, real = batch("mixed")
    stock = run_logits(model, ids, real.long())[real]
    with unpadding(model):
        got = run_logits(model, ids, real.long())[real]
    judge(f"{kv_heads} KV heads", got, stock, truth_logits(model, ids, real)[real])
