"""A model that accelerate has prepared for mixed precision, patched before or after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import padless

VOCABULARY = 64


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


@pytest.fixture
def prepare() -> Any:
    # The state is the process's, and refuses a second precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True).prepare
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_mixed_precision_computes_the_same_and_runs_the_head_on_real_tokens(
    model: LlamaForCausalLM, prepare: Callable[..., Any], batch: dict[str, Tensor], when: str
) -> None:
    heads: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape))
    handle = padless.patch(model) if when == "before" else None
    model = prepare(model)
    handle = handle or padless.patch(model)
    out = model(**batch, use_cache=False)
    assert heads == [(1, 14, VOCABULARY)]
    real = batch["attention_mask"].bool()
    handle.undo()
    want = model(**batch, use_cache=False)
    assert heads[1] == (2, 9, VOCABULARY)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-2, atol=0.0)
    assert out.logits.dtype == want.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits[real], want.logits[real], rtol=0.05, atol=0.05)


def test_patched_after_the_logits_are_padded_only_when_they_are_read(
    model: LlamaForCausalLM, prepare: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    model = prepare(model)
    with padless.patch(model):
        out = model(**batch, use_cache=False)
        assert out.__dict__["logits"].shape == (1, 14, VOCABULARY)
        assert out.logits.shape == (2, 9, VOCABULARY)


def test_a_patch_inside_of_mixed_precision_is_set_aside_and_comes_back(
    model: LlamaForCausalLM, prepare: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    handle = padless.patch(model)
    model = prepare(model)
    model(**batch)
    # Verifying sets the patch aside.
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    report = padless.verify(model, asked, paths=("patch",), new_tokens=2)
    assert {check.name for check in report.paths[0].checks if not check.passed} <= {
        # bfloat16 rounds by other batches.
        "greedy tokens"
    }
    assert handle.report().forwards == 1
    model(**batch)
    assert handle.report().forwards == 2
    handle.undo()
    model(**batch)
    assert handle.report().forwards == 2
    with padless.patch(model) as again:
        model(**batch)
        assert again.report().forwards == 1
