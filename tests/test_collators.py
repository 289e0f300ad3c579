"""The packing and the padding collator: what is in a batch, and that both train to the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import padless
from padless import PackingCollator, PaddingCollator

EXAMPLES = [
    {"input_ids": [5, 6, 7]},
    {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])},
    {"input_ids": [9, 10, 11, 0], "labels": [-100, 10, 11, 0], "attention_mask": [1, 1, 1, 0]},
]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def test_packing_puts_examples_end_to_end() -> None:
    batch = PackingCollator()(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert batch["layout"].lengths == (3, 1, 3)


def test_packing_without_a_layout_gives_what_transformers_knows() -> None:
    batch = PackingCollator(with_layout=False)(EXAMPLES)
    assert "layout" not in batch
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 7]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


@pytest.mark.parametrize(
    ("side", "ids", "labels"),
    [
        (
            "right",
            [[5, 6, 7, 1], [8, 1, 1, 1], [9, 10, 11, 1]],
            [[-100, 6, 7, -100], [-100] * 4, [-100, 10, 11, -100]],
        ),
        (
            "left",
            [[1, 5, 6, 7], [1, 1, 1, 8], [1, 9, 10, 11]],
            [[-100, -100, 6, 7], [-100] * 4, [-100, -100, 10, 11]],
        ),
    ],
)
def test_padding_pads_to_the_longest(side: Any, ids: list[Any], labels: list[Any]) -> None:
    batch = PaddingCollator(1, side, pad_to_multiple_of=2)(EXAMPLES)
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == [[int(i != 1) for i in row] for row in ids]


def test_examples_are_left_as_they_were() -> None:
    before = copy.deepcopy(EXAMPLES)
    PackingCollator()(EXAMPLES)
    PaddingCollator(0)(EXAMPLES)
    assert str(before) == str(EXAMPLES)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("with_layout", [True, False])
def test_packed_and_padded_batches_have_the_same_gradients(side: Any, with_layout: bool) -> None:
    stock, patched = _model(), _model()
    padless.patch(patched)
    losses, gradients = [], []
    for model, batch in (
        (stock, PaddingCollator(1, side)(EXAMPLES)),
        (patched, PaddingCollator(1, side)(EXAMPLES)),
        (patched, PackingCollator(with_layout=with_layout)(EXAMPLES)),
    ):
        model.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example, got none"),
        ([{"input_ids": []}], "example 0 has 0"),
        ([{"input_ids": [1, 2], "labels": [1]}], "got 1 and 2 in example 0"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "example 0 has 0"),
    ],
)
@pytest.mark.parametrize("collator", [PackingCollator(), PaddingCollator(0)])
def test_bad_examples_are_refused(collator: Any, examples: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator(examples)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', got 'up'"):
        PaddingCollator(0, "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_to_multiple_of must be 1 or more, got 0"):
        PaddingCollator(0, pad_to_multiple_of=0)
