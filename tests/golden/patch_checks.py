"""What a patched model is checked for, as the test of planted faults needs it: in one call each."""

from __future__ import annotations

import torch
from torch import Tensor

import padless
from golden.documents import document_labels, document_numbers, restarting_positions, visible_within
from golden.models import VOCAB, batch, build_model, judge, run_logits, truth_logits
from golden.steps import documents_step, judge_step, labels_of, run_step, truth_step
from golden.test_patch_cache import keys_and_values
from padless.verification import perturbation_probe


def check_step() -> None:
    """Loss, logits, gradients and the perturbation probe, on padded batches."""
    model = build_model().train()
    for padding in ("none", "left", "right"):
        ids, real = batch(padding)
        labels = labels_of(ids, real)
        stock = run_step(model, ids, real.long(), labels=labels)
        with padless.patch(model):
            got = run_step(model, ids, real.long(), labels=labels)
            result = perturbation_probe(
                lambda changed, real=real: run_logits(model, changed, real.long()),
                ids,
                real,
                vocab_size=VOCAB,
            )
        judge_step(got, stock, truth_step(model, ids, real, labels), real)
        assert result.passed, str(result)


def check_hole() -> None:
    """Padding between real tokens."""
    # Positions go on over padding in between, which shows in the distances across it.
    model = build_model()
    ids, real = batch("none")
    real[1, 4:8] = False
    stock = run_logits(model, ids, real.long())
    with padless.patch(model):
        got = run_logits(model, ids, real.long())
    judge("hole", got[real], stock[real], truth_logits(model, ids, real)[real])


def check_documents() -> None:
    """Packed rows."""
    model = build_model().train()
    ids, _ = batch("none")
    documents = document_numbers([(5, 8), (13,), (1, 4, 8)])
    positions, real = restarting_positions(documents), documents >= 0
    labels = document_labels(ids, documents)
    alone = documents_step(model, ids, documents, labels)
    truth = truth_step(
        model, ids, real, labels, visible=visible_within(documents), position_ids=positions
    )
    with padless.patch(model):
        judge_step(
            run_step(model, ids, None, labels=labels, position_ids=positions), alone, truth, real
        )


def check_bound_labels() -> None:
    """Labels at padding."""
    model = build_model()
    ids, real = batch("left")
    stock = run_step(model, ids, real.long(), labels=ids)
    with padless.patch(model):
        got = run_step(model, ids, real.long(), labels=ids)
    assert torch.equal(got.loss, stock.loss)


def check_cache() -> None:
    """Keys and values of real tokens."""
    model = build_model()
    ids, real = batch("left")

    def run() -> list[Tensor]:
        out = model(ids, attention_mask=real.long(), use_cache=True, return_dict=True)
        return [x.transpose(1, 2)[real] for x in keys_and_values(out.past_key_values)]

    stock = run()
    with padless.patch(model):
        got = run()
    for a, b in zip(got, stock, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4), "another cache"


def check_outputs() -> None:
    """Padded shapes, and zeros at padding."""
    model = build_model()
    ids, real = batch("mixed")
    with padless.patch(model):
        out = model(ids, attention_mask=real.long(), output_hidden_states=True, return_dict=True)
    for each in (out.logits, *out.hidden_states):
        assert each.shape[:2] == ids.shape, "not of the padded shape"
        assert each[~real].abs().sum() == 0.0, "not zero at padding"


def check_hooks() -> None:
    """What hooks on projections see."""
    model = build_model()
    seen: list[Tensor] = []
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    ids, real = batch("left")
    with padless.patch(model):
        run_logits(model, ids, real.long())
    assert torch.allclose(seen[1], projection(seen[0]), atol=1e-5), "a hook saw rotated queries"
