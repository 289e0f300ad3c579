"""TRL's collator and its fused head on a patched model, against each document by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import padless

pytestmark = pytest.mark.requires("trl")

DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
LAYERS = 2


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def _batch(*, padding_free: bool) -> dict[str, Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    return dict(collate([{"input_ids": ids} for ids in DOCUMENTS]))


def _loss_of_each(model: LlamaForCausalLM) -> torch.Tensor:
    """The loss over all documents, computed one at a time."""
    sums = []
    for ids in DOCUMENTS:
        row = torch.tensor([ids])
        sums.append(model(row, labels=row, use_cache=False).loss * (len(ids) - 1))
    return torch.stack(sums).sum() / sum(len(ids) - 1 for ids in DOCUMENTS)


def test_documents_of_a_padding_free_batch_do_not_see_each_other(model: LlamaForCausalLM) -> None:
    batch = _batch(padding_free=True)
    want = _loss_of_each(model)
    with padless.patch(model) as handle:
        got = model(**batch, use_cache=False).loss
        report = handle.report()
    torch.testing.assert_close(got, want)
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_fused_head_gives_its_outputs_in_the_shape_of_the_batch(
    model: LlamaForCausalLM, when: str, padding_free: bool
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    batch = _batch(padding_free=padding_free)
    want = _loss_of_each(model)
    if when == "after":
        add_fused_lm_head(model)
    with padless.patch(model) as handle:
        if when == "before":
            add_fused_lm_head(model)
        out = model(**batch, use_cache=False, fused_lm_head=True)
        report = handle.report()
    torch.testing.assert_close(out.loss, want)
    rows, seqlen = batch["input_ids"].shape
    # What GRPO and DPO pick completions from, by their padded positions.
    assert out.log_probs.shape == out.label_mask.shape == (rows, seqlen - 1)
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)
