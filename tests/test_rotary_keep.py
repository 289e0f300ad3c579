"""Rotating and keeping a decoding step by one kernel: who is served, and what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import padless
from interpreted import passed_in_the_interpreter
from kernel_launches import ptx_for_hopper
from norm_cases import LAYERS, NEW, build_model, generate
from padless.generation.store import RaggedStore
from padless.kernels import rotary_keep, trial
from padless.unpadded import layer
from rotary_keep_cases import SHAPES, inputs, twin


@pytest.mark.requires("triton")
def test_kernel_passes_its_tests_in_the_interpreter() -> None:
    assert passed_in_the_interpreter("rotary_keep_interpreted.py") > 6 * len(SHAPES)


@pytest.mark.requires("triton")
def test_kernel_compiles_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padless.kernels.rotary_keep_triton import _rotate_and_keep_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HALF": 64, "BLOCK": 64}
    ptx = ptx_for_hopper(kernel, constants, {"slots_ptr": "*i64"}, num_warps=1)
    # Two numbers of half precision a thread, not one.
    assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {"b32"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_keep, "is_gpu", lambda device: True)
    monkeypatch.setattr(rotary_keep, "_fault", lambda device: None)


class _Other(Tensor):
    pass


def _changed(number: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    given = inputs((4, 6, 2, 8), torch.bfloat16)
    given[number] = change(given[number])
    return given


@pytest.mark.parametrize(
    "given",
    [
        _changed(0, lambda x: x.float()),
        _changed(2, lambda x: x.half()),
        _changed(5, lambda x: x.float()),
        _changed(0, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        _changed(3, lambda x: x[0]),
        _changed(3, lambda x: x[:, :1]),
        _changed(1, lambda x: x.as_subclass(_Other)),
        _changed(7, lambda x: x[:2]),
        _changed(6, lambda x: x[:5]),
        _changed(5, lambda x: x.to("meta")),
    ],
    ids=["q", "v", "buffer", "strided", "dims", "rows", "class", "slots", "buffers", "device"],
)
@torch.no_grad()
def test_what_the_kernel_does_not_take(given: list[Tensor], served: None) -> None:
    assert rotary_keep._serves(*inputs((4, 6, 2, 8), torch.bfloat16))
    assert not rotary_keep._serves(*given)


def test_modes_that_are_left_to_torch(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs((4, 6, 2, 8), torch.float32)
    assert not rotary_keep._serves(*given), "autograd"
    with torch.no_grad():
        for mode in ("is_tracing", "is_compiling"):
            with monkeypatch.context() as planted:
                planted.setattr(rotary_keep, mode, lambda: True)
                assert not rotary_keep._serves(*given)
        assert rotary_keep._serves(*given)


@torch.no_grad()
def test_a_broken_triton_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs((4, 6, 2, 8), torch.float32)
    assert not rotary_keep.rotate_and_keep(*given), "the CPU"
    monkeypatch.setattr(rotary_keep, "is_gpu", lambda device: True)
    monkeypatch.setattr(trial, "import_optional", lambda name: (None, "no triton"))
    monkeypatch.setattr(rotary_keep, "_fault", rotary_keep._fault.__wrapped__)
    before = given[0].clone()
    assert not rotary_keep.rotate_and_keep(*given)
    assert torch.equal(given[0], before)


# In a call of generate


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the twin in the kernel's place on the CPU; lists who keeps keys from now on."""
    seen: list[str] = []
    put = RaggedStore.put_newest

    def by_twin(*given: Tensor) -> bool:
        seen.append("kernel")
        for x, new in zip((given[0], *given[5:7]), twin(list(given)), strict=True):
            x.copy_(new)
        return True

    def by_torch(self: RaggedStore, *args: Any) -> None:
        seen.append("torch")
        put(self, *args)

    monkeypatch.setattr(layer, "rotate_and_keep", by_twin)
    monkeypatch.setattr(RaggedStore, "put_newest", by_torch)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"eos_token_id": 7}, {"return_dict_in_generate": True}],
    ids=["greedy", "beams", "ended", "cache"],
)
def test_tokens_are_those_of_the_unpatched_model(
    model: LlamaForCausalLM, calls: list[str], options: dict[str, Any]
) -> None:
    want = generate(model, new=40, **options)
    with padless.patch(model) as handle:
        got = generate(model, new=40, **options)
        steps = handle.report().decoding_steps
    assert steps and calls == LAYERS * steps * ["kernel"]
    if "return_dict_in_generate" not in options:
        assert torch.equal(got, want)
        return
    assert torch.equal(got.sequences, want.sequences)
    real = generate_mask(got.past_key_values.get_seq_length())
    for ours, theirs in zip(got.past_key_values, want.past_key_values, strict=True):
        for x, y in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real])


def generate_mask(columns: int) -> Tensor:
    """Says which slots of the prompt of `generate` and of what follows are real."""
    real = torch.ones(3, columns, dtype=torch.bool)
    real[1, :2], real[2, :4] = False, False
    return real


class _Projection(nn.Linear):
    pass


def test_a_projection_that_is_not_plain_is_rotated_by_itself(
    model: LlamaForCausalLM, calls: list[str]
) -> None:
    """Somebody may read what it returned."""
    model.model.layers[0].self_attn.q_proj.__class__ = _Projection
    want = generate(model)
    with padless.patch(model):
        assert torch.equal(generate(model), want)
    assert calls == (NEW - 1) * ["torch", "kernel"]
