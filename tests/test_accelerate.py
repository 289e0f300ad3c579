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
    assert model.forward.__func__ is not vars(model)["_padless_door"].__func__
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


def test_patched_before_the_logits_are_padded_only_when_they_are_read(
    model: LlamaForCausalLM, prepare: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    handle = padless.patch(model)
    model = prepare(model)
    wrapper = model.forward
    want = model(**batch, use_cache=False)  # inside of the wrapper once: torch has looked it up
    assert want.__dict__["logits"].shape == (2, 9, VOCABULARY)
    for _ in range(2):
        out = model(**batch, use_cache=False)
        assert out.__dict__["logits"].shape == (1, 14, VOCABULARY)
        assert out.loss.dtype == torch.float32 and torch.equal(out.loss, want.loss)
        assert out.logits.dtype == torch.float32 and torch.equal(out.logits, want.logits)
    assert handle.report().computed_tokens == 3 * 14
    # What is left to transformers goes through the wrapper too, and so do calls of other kinds.
    stock = model(**batch, output_attentions=True)
    assert stock.logits.dtype == torch.float32 and handle.report().stock == {"output_attentions": 1}
    some = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**some, logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)
    handle.undo()
    assert model.forward == wrapper
    assert not [name for name in vars(model) if name in ("_padless_outer", "_padless_wrapper")]
    plain = model(**batch, use_cache=False)
    assert plain.__dict__["logits"].shape == (2, 9, VOCABULARY)
    torch.testing.assert_close(plain.loss, want.loss, rtol=1e-2, atol=0.0)


def test_generate_under_mixed_precision_is_what_it_was(
    model: LlamaForCausalLM, prepare: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    handle = padless.patch(model)
    model = prepare(model)
    first = model.generate(**left, **options)
    model(**batch)
    model(**batch)  # the outer door is in front
    assert torch.equal(model.generate(**left, **options), first)
    assert handle.report().generations == 2


def test_a_wrapper_that_is_not_known_stays_in_front(model: LlamaForCausalLM, batch: Any) -> None:
    handle = padless.patch(model)
    door = model.forward
    seen: list[torch.Size] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = door(*args, **kwargs)
        seen.append(out.logits.shape)
        return out

    forward.__wrapped__ = door.__func__  # type: ignore[attr-defined]
    model.forward = forward
    for _ in range(3):
        model(**batch)
    assert seen == [(2, 9, VOCABULARY)] * 3
    assert handle.report().forwards == 3


@pytest.mark.parametrize("forwards", [0, 2])
def test_the_head_stays_patched_when_mixed_precision_is_taken_off(
    model: LlamaForCausalLM, batch: dict[str, Tensor], forwards: int
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    heads: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape))
    with padless.patch(model) as handle:
        model = accelerator.prepare(model)
        for _ in range(forwards):
            model(**batch)
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        heads.clear()
        outs = [model(**batch, use_cache=False) for _ in range(3)]
        # Torch has looked the first one's forward up by the time that the door is back.
        assert heads == [(2, 9, VOCABULARY), *[(1, 14, VOCABULARY)] * 2]
        assert outs[2].logits.dtype == torch.float32
        assert handle.report().forwards == forwards + 3
    heads.clear()
    model(**batch)
    assert heads == [(2, 9, VOCABULARY)]
    AcceleratorState._reset_state(reset_partial_state=True)
