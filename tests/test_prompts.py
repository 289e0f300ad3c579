"""Which prompts of `generate` are served, asked of the arguments alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from padless.hf.eras import installed_era
from padless.kernels.unpad import FlatTokens, Unpadded
from padless.unpadded import structure
from padless.unpadded.call import flatten_prompt
from padless.unpadded.prompts import Prompt, prompt_reason, read_prompt, step_reason


def _prompt(**changed: Any) -> dict[str, Any]:
    ids = torch.arange(3, 11).view(2, 4).repeat_interleave(2, 0)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).repeat_interleave(2, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **changed}


def _with(tensor: Tensor, at: tuple[int, int], value: int) -> Tensor:
    changed = tensor.clone()
    changed[at] = value
    return changed


def _copies(prompt: dict[str, Any], copies: int) -> int:
    found = read_prompt(prompt, copies)
    assert found.ends_real
    return found.copies


@pytest.mark.parametrize("without", [(), ("attention_mask",), ("position_ids",)], ids=str)
def test_copies_of_a_prompt_are_found(without: tuple[str, ...]) -> None:
    prompt = {name: x for name, x in _prompt().items() if name not in without}
    assert _copies(prompt, 2) == 2
    assert _copies(prompt, 1) == 1
    # Four rows are not three of each, and not four of one.
    assert _copies(prompt, 3) == 1
    assert _copies(prompt, 4) == 1


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_rows_that_differ_are_no_copies(name: str) -> None:
    prompt = _prompt()
    prompt[name] = _with(prompt[name], (3, 1), 7)
    assert _copies(prompt, 2) == 1


def test_rows_of_one_line_of_positions_are_computed_each() -> None:
    assert _copies(_prompt(position_ids=torch.arange(4)[None]), 2) == 1


def test_a_prompt_that_ends_in_padding_is_found() -> None:
    prompt = _prompt()
    mask = _with(prompt["attention_mask"], (2, 3), 0)
    assert not read_prompt({**prompt, "attention_mask": mask}, 1).ends_real
    assert read_prompt({"input_ids": prompt["input_ids"]}, 1).ends_real


ONES = torch.ones(4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({}, True),
        # What stands at padding is nobody's position.
        ({"position_ids": _with(_prompt()["position_ids"], (2, 0), 1)}, True),
        ({"attention_mask": ONES.bool(), "position_ids": torch.arange(4).expand(4, 4)}, True),
        # Counted by slots, from another number, as two documents, or not at all.
        ({"position_ids": torch.arange(4).expand(4, 4)}, False),
        ({"position_ids": _prompt()["position_ids"] + 1}, False),
        ({"attention_mask": ONES, "position_ids": torch.tensor([[0, 1, 0, 1]] * 4)}, False),
        ({"position_ids": 0 * ONES}, False),
        ({"attention_mask": 2 * ONES, "position_ids": torch.arange(4).expand(4, 4)}, False),
        # Not asked.
        ({"position_ids": torch.arange(4)[None]}, False),
        ({"position_ids": None}, False),
        # Without a mask every slot is real.
        ({"attention_mask": None, "position_ids": torch.arange(4).expand(4, 4)}, True),
        ({"attention_mask": None, "position_ids": torch.arange(4)[None]}, True),
        ({"attention_mask": None, "position_ids": torch.arange(4)}, False),
        ({"attention_mask": None}, False),
        ({"attention_mask": None, "position_ids": torch.arange(1, 5).expand(4, 4)}, False),
        ({"attention_mask": None, "position_ids": torch.tensor([[0, 1, 0, 1]] * 4)}, False),
        ({"attention_mask": None, "position_ids": 0 * ONES}, False),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_positions_that_count_real_tokens_are_found(
    changed: dict[str, Any], counts: bool, copies: int
) -> None:
    assert read_prompt(_prompt(**changed), copies).counts_tokens == counts


@pytest.mark.parametrize(
    ("mask", "hides_nothing"),
    [
        (ONES, True),
        (ONES.bool(), True),
        (_prompt()["attention_mask"], False),
        (_with(ONES, (2, 1), 0), False),
        # Left to transformers, as any call with such a mask.
        (ONES.float(), False),
        (None, False),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_masks_that_hide_nothing_are_found(
    mask: Tensor | None, hides_nothing: bool, copies: int
) -> None:
    assert read_prompt(_prompt(attention_mask=mask), copies).hides_nothing == hides_nothing


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def _filled() -> DynamicCache:
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 4, 2, 1, 4), 0)
    return cache


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"past_key_values": None, "use_cache": True}, None),
        ({"attention_mask": None}, None),
        ({"output_attentions": False}, None),
        ({"past_key_values": None}, "without a cache"),
        ({"past_key_values": _filled()}, "a cache that was there before"),
        ({"past_key_values": DynamicCache(offloading=True)}, "a cache of another kind"),
        ({"past_key_values": object()}, "a cache of another kind, object"),
        ({"labels": torch.zeros(4, 4)}, "the argument labels"),
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"input_ids": None}, "no prompt"),
        ({"input_ids": torch.zeros(4, 0).long()}, "no prompt"),
        ({"input_ids": torch.zeros(4, 4, device="meta").long()}, "several devices"),
        ({"attention_mask": torch.ones(4, 1, 4, 4)}, "a mask that is not"),
    ],
)
@torch.no_grad()
def test_what_a_prompt_is_refused_for(
    model: LlamaForCausalLM, changed: dict[str, Any], reason: str | None
) -> None:
    prompt = {"past_key_values": DynamicCache(), **_prompt(), **changed}
    given = prompt_reason([*model.modules()], prompt)
    assert (given is None) if reason is None else (reason in str(given))


def test_gradients_are_refused(model: LlamaForCausalLM) -> None:
    prompt = {"past_key_values": DynamicCache(), **_prompt()}
    assert prompt_reason([*model.modules()], prompt) == "gradients"


@torch.no_grad()
def test_checkpointing_in_training_mode_is_refused(model: LlamaForCausalLM) -> None:
    prompt = {"past_key_values": DynamicCache(), **_prompt()}
    model.gradient_checkpointing_enable()
    try:
        assert prompt_reason([*model.eval().modules()], prompt) is None
        assert prompt_reason([*model.train().modules()], prompt) == "checkpointing in training mode"
    finally:
        model.gradient_checkpointing_disable()


class _Store:
    batch, columns = 2, 6


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"position_ids": None}, None),
        ({"position_ids": torch.tensor([[3]])}, None),
        ({"input_ids": torch.ones(2, 3).long()}, "not one token a row"),
        ({"input_ids": torch.ones(3, 1).long()}, "not one token a row"),
        ({"input_ids": None}, "not one token a row"),
        ({"attention_mask": None}, "a mask that comes or goes"),
        ({"attention_mask": torch.ones(2, 6)}, "a mask that is not the prompt's"),
        ({"position_ids": torch.ones(2, 2)}, "position_ids that are not"),
        ({"inputs_embeds": torch.ones(2, 1, 8)}, "the argument inputs_embeds"),
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"output_attentions": False, "labels": None}, None),
    ],
)
def test_what_a_step_is_refused_for(changed: dict[str, Any], reason: str | None) -> None:
    step = {
        "input_ids": torch.ones(2, 1).long(),
        "attention_mask": torch.ones(2, 7),
        "position_ids": torch.tensor([[3], [4]]),
        "past_key_values": object(),
        "use_cache": True,
        **changed,
    }
    store: Any = _Store()
    given = step_reason(step, store, rows=2, has_mask=True)
    assert (given is None) if reason is None else (reason in str(given))


def _kernels(mask: Tensor, ids: Tensor | None, *_: None) -> Unpadded:
    """Stands for the kernels: buffers for all slots, of which the first ones are filled."""
    real = mask.flatten().nonzero()[:, 0]
    lengths = mask.bool().sum(1)

    def buffer(filled: Tensor) -> Tensor:
        return F.pad(filled, (0, mask.numel() - len(filled)), value=-7)

    return Unpadded(
        torch.cat([lengths, torch.zeros_like(lengths)]),
        F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        buffer(real),
        FlatTokens(
            buffer(real % mask.shape[1]),
            None if ids is None else buffer(ids.flatten()[real]),
            None,
            None,
        ),
    )


@pytest.mark.parametrize("by", ["torch", "kernels"])
@pytest.mark.parametrize("given", ["ids", "embeddings", "no mask", "ones"])
def test_a_prompt_whose_positions_are_known_to_count_is_the_same_batch(
    model: LlamaForCausalLM, by: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = _prompt()
    is_whole = given in ("no mask", "ones")
    if is_whole:
        mask = None if given == "no mask" else ONES
        prompt.update(attention_mask=mask, position_ids=torch.arange(4).expand(4, 4))
    if given == "embeddings":
        prompt["inputs_embeds"] = torch.randn(4, 4, 8)
        del prompt["input_ids"]

    def flat(known: Prompt) -> tuple[Any, dict[str, Any]]:
        arguments = dict(prompt)
        batch = flatten_prompt(model.model, arguments, "auto", installed_era(), known)
        assert batch is not None
        return batch, arguments

    want, expected = flat(
        Prompt(ends_real=True, hides_nothing=False, copies=1, counts_tokens=False)
    )
    if by == "kernels":
        monkeypatch.setattr(structure, "unpad_rows", _kernels)
    found, arguments = flat(read_prompt(prompt, 1))
    lengths = (4, 4, 4, 4) if is_whole else (4, 4, 3, 3)
    assert found.layout.lengths == want.layout.lengths == lengths
    assert (found.layout.indices is None) == (want.layout.indices is None) == is_whole
    if want.layout.indices is not None:
        assert torch.equal(found.layout.indices, want.layout.indices)
    assert arguments.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(arguments[name], tensor), name
