"""Documents packed into rows: each as if it were alone, whoever says where they are, and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden.documents import (
    ROWS,
    cu_seqlens_of,
    document_labels,
    draw,
    layout_of,
    restarting_positions,
    visible_within,
)
from golden.models import VOCAB, build_model, judge, run_logits
from golden.steps import documents_step, judge_step, run_step, truth_step, unpadding
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("packed")

SOURCES = ("position_ids", "cu_seq_lens", "both", "layout")
# Without a mask, only a layout says what is padding.
CASES = [
    (source, rows, mask)
    for source in SOURCES
    for rows in ROWS
    for mask in ("none", "real")
    if source == "layout" or mask == "real" or "padding" not in rows
]


def _boundaries(source: str, documents: Tensor) -> dict[str, Any]:
    """Says where documents are, in one of the ways."""
    longest = int(documents[documents >= 0].unique(return_counts=True)[1].max())
    cu_seqlens = {
        "cu_seq_lens_q": cu_seqlens_of(documents),
        "cu_seq_lens_k": cu_seqlens_of(documents),
        "max_length_q": longest,
        "max_length_k": longest,
    }
    positions = {"position_ids": restarting_positions(documents)}
    return {
        "position_ids": positions,
        "cu_seq_lens": cu_seqlens,
        "both": {**cu_seqlens, **positions},
        "layout": {"layout": layout_of(documents), **positions},
    }[source]


@pytest.mark.parametrize(("source", "rows", "mask"), CASES)
@pytest.mark.parametrize("use_cache", [False, True])
def test_each_document_as_if_alone(source: str, rows: str, mask: str, use_cache: bool) -> None:
    model = build_model().train(not use_cache)
    ids, documents = draw(rows)
    real = documents >= 0
    labels = document_labels(ids, documents)
    alone = documents_step(model, ids, documents, labels)
    options = {**_boundaries(source, documents), "labels": labels, "use_cache": use_cache}
    with unpadding(model) as handle:
        got = run_step(model, ids, real.long() if mask == "real" else None, **options)
        assert handle.report().computed_tokens == int(real.sum())
    if source != "cu_seq_lens":
        visible, positions = visible_within(documents), restarting_positions(documents)
        truth = truth_step(model, ids, real, labels, visible=visible, position_ids=positions)
        judge_step(got, alone, truth, real)
        return
    # Boundaries alone: positions go on over them, which rotary embeddings see in roundings only.
    torch.testing.assert_close(got.loss, alone.loss)
    torch.testing.assert_close(got.logits, alone.logits, atol=1e-4, rtol=1e-4)
    for name, gradient in got.gradients.items():
        scale = float(alone.gradients[name].abs().max())
        torch.testing.assert_close(gradient, alone.gradients[name], rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("source", "rows", "mask", "caller", "use_cache"),
    # Each way by the model without a cache or by its body with one, in turns.
    [(*case, *(("model", False), ("body", True))[i % 2]) for i, case in enumerate(CASES)],
)
def test_changing_a_token_changes_its_document_alone(
    source: str, rows: str, mask: str, caller: str, use_cache: bool
) -> None:
    model = build_model().train(not use_cache)
    ids, documents = draw(rows)
    real = documents >= 0
    options = {
        **_boundaries(source, documents),
        "use_cache": use_cache,
        "return_dict": True,
        "attention_mask": real.long() if mask == "real" else None,
    }

    def run(changed: Tensor) -> Tensor:
        called = model if caller == "model" else model.model
        out = called(input_ids=changed, **options)
        return out.logits if caller == "model" else out.last_hidden_state

    with unpadding(model):
        result = perturbation_probe(run, ids, real, vocab_size=VOCAB, documents=documents)
    assert result.passed, str(result)


def test_documents_are_judged_by_what_leaks() -> None:
    # The checks above can see a leak: without a patch, positions that restart part nothing.
    model = build_model("mha").train()
    ids, documents = draw("one row")
    positions = restarting_positions(documents)
    ones = torch.ones_like(ids)
    leaky = run_logits(model, ids, ones, position_ids=positions, use_cache=True)
    labels = document_labels(ids, documents)
    alone = documents_step(model, ids, documents, labels)
    truth = truth_step(
        model, ids, documents >= 0, labels,
        visible=visible_within(documents), position_ids=positions,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="over budget"):
        judge("logits", leaky, alone.logits, truth.logits)
