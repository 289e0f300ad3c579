"""What `patch` and the calls of a patched model refuse, in words that say what to do."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig
from transformers import MistralForCausalLM as OtherModel

import padless
from padless import VarlenLayout
from padless.selection import BACKENDS
from padless.unpadded import engagement

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(1, 17).view(2, 8)


def _state(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("what", [None, "model", LlamaForCausalLM, {"model": 1}])
def test_what_is_no_module(what: Any) -> None:
    with pytest.raises(TypeError, match="model must be a torch module, got"):
        padless.patch(what)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), OtherModel(MistralConfig(**SMALL))])
def test_what_holds_no_llama(other: nn.Module) -> None:
    before = _state(other)
    name = type(other).__name__
    with pytest.raises(padless.UnsupportedError, match=f"must hold a LLaMA.*got {name} without"):
        padless.patch(other)
    assert _state(other) == before


@pytest.mark.parametrize("backend", ["flash", "AUTO", "", None, "fa9"])
@pytest.mark.parametrize("scope", ["model", "process"])
def test_backend_of_no_such_name(model: LlamaForCausalLM, backend: Any, scope: str) -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or one of") as caught:
        padless.patch(model, backend=backend) if scope == "model" else padless.patch_llama(
            backend=backend
        )
    assert all(name in str(caught.value) for name in BACKENDS)
    assert repr(backend) in str(caught.value)


def test_no_layer_is_patched_when_one_cannot_be(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All or nothing: the third change fails, and the first two are taken back.
    before = _state(model)
    calls = []
    apply = engagement.Door.apply

    def fail(self: Any) -> None:
        calls.append(self.where)
        if len(calls) == 3:
            raise RuntimeError("no more")
        apply(self)

    padless.patch(model).undo()  # proven: what fails is this model's
    monkeypatch.setattr(engagement.Door, "apply", fail)
    with pytest.raises(RuntimeError, match="no more"):
        padless.patch(model)
    monkeypatch.undo()
    assert len(calls) == 3 and _state(model) == before
    with padless.patch(model):
        pass


@pytest.mark.parametrize("scope", ["model", "process"])
def test_numbers_that_differ_are_refused_before_anything_changes(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    from padless.unpadded import layer, proof

    sound = layer.run
    monkeypatch.setattr(layer, "run", lambda *a, **k: 1.01 * sound(*a, **k))
    monkeypatch.setattr(proof, "_proven", set())
    before, forward = _state(model), LlamaModel.forward
    with pytest.raises(padless.EngagementError, match="got the loss off by") as caught:
        padless.patch(model) if scope == "model" else padless.patch_llama()
    assert "era" in str(caught.value)
    assert _state(model) == before and LlamaModel.forward is forward
    assert "_padless_ledger" not in vars(LlamaModel)


def test_proof_runs_once_and_leaves_random_numbers_alone(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from padless.unpadded import proof

    monkeypatch.setattr(proof, "_proven", set())
    made = []
    tiny = proof._tiny_model
    monkeypatch.setattr(proof, "_tiny_model", lambda: made.append(1) or tiny())
    torch.manual_seed(4)
    want = torch.rand(3)
    torch.manual_seed(4)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        padless.patch(model).undo()
    assert torch.equal(torch.rand(3), want)
    padless.patch(model).undo()
    padless.patch_llama().undo()
    assert len(made) <= 2


def test_transformers_too_old(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.27.4")
    for patch in (lambda: padless.patch(model), padless.patch_llama):
        with pytest.raises(padless.UnsupportedError, match=r"must be 4\.28 or newer, got 4\.27\.4"):
            patch()


def test_transformers_missing(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(padless.UnsupportedError, match="transformers must be installed"):
        padless.patch(model)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"layout": [3, 5]},
            TypeError,
            "layout must be a VarlenLayout, got list; build one with VarlenLayout.from_lengths",
        ),
        (
            {"layout": VarlenLayout.from_lengths([8, 8])},
            ValueError,
            r"layout must be of the batch's shape \(2, 8\), got \(1, 16\)",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 16])},
            ValueError,
            r"have a boundary at the end of each of the 2 rows of 8 tokens.*got \[0, 16\]",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 8, 16]), "cu_seq_lens_k": torch.tensor([0, 9, 16])},
            ValueError,
            "equal cu_seq_lens_k",
        ),
        (
            {"layout": VarlenLayout.from_rows(2, 8), "attention_mask": torch.eye(2, 8)},
            padless.UnsupportedError,
            "a floating attention_mask takes transformers' own path, which would let the documents "
            "of layout see each other; leave it out",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 8, 16]), "is_causal": False},
            padless.UnsupportedError,
            "is_causal=False takes transformers' own path.*documents of cu_seq_lens_q",
        ),
        (
            {"cu_seq_lens_k": torch.tensor([0, 8, 16]), "output_attentions": True},
            padless.UnsupportedError,
            "output_attentions takes transformers' own path.*documents of cu_seq_lens_k",
        ),
    ],
)
@pytest.mark.parametrize("caller", ["model", "body"])
def test_boundaries_that_cannot_be_kept(
    model: LlamaForCausalLM, ids: Tensor, caller: str, given: Any, error: Any, text: str
) -> None:
    with padless.patch(model) as handle:
        with pytest.raises(error, match=text):
            (model if caller == "model" else model.model)(input_ids=ids, **given)
        # Nothing was served, and nothing is broken.
        assert handle.report().forwards == 0
        model(ids)
        assert handle.report().forwards == 1


@pytest.mark.parametrize("caller", ["model", "body"])
def test_calls_that_transformers_refuses_are_refused_alike(
    model: LlamaForCausalLM, ids: Tensor, caller: str
) -> None:
    called = model if caller == "model" else model.model
    calls = [
        ((), {}),
        ((ids,), {"inputs_embeds": torch.zeros(2, 8, 32)}),
        ((ids, *[None] * 30), {}),
        ((ids[:, :0],), {}),
    ]

    def outcome(args: Any, options: Any) -> Any:
        try:
            return type(called(*args, **options))
        except Exception as error:
            return type(error)

    stock = [outcome(*call) for call in calls]
    with padless.patch(model):
        assert [outcome(*call) for call in calls] == stock


def test_undo_in_the_middle_of_nothing_is_quiet(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    handle = padless.patch(model)
    handle.undo()
    handle.undo()
    assert not caplog.records


def test_undo_leaves_what_was_replaced_since_and_says_so(
    model: LlamaForCausalLM, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    handle = padless.patch(model)

    def mine(*args: Any, **kwargs: Any) -> str:
        return "mine"

    model.model.forward = mine
    handle.undo()
    assert model.model.forward is mine
    (record,) = caplog.records
    assert "model.forward was replaced again since" in record.getMessage()
    del model.model.forward
    model(ids)


class _OtherHead(LlamaForCausalLM):
    """A head of somebody else's that calls itself by the names of transformers'."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # What a flat batch would not have: a row for each text.
        assert kwargs["input_ids"].shape[0] == 2
        return super().forward(*args, **kwargs)


class _DecoratedHead(LlamaForCausalLM):
    """One in a decorator, as transformers has them around its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["input_ids"].shape[0] == 2
        return super().forward(*args, **kwargs)

    forward = torch.no_grad()(forward)


@pytest.mark.parametrize("cls", [_OtherHead, _DecoratedHead])
def test_a_head_of_somebody_elses_keeps_its_batch(cls: type[LlamaForCausalLM], ids: Tensor) -> None:
    model = cls(LlamaConfig(**SMALL)).eval()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    want = model(input_ids=ids, attention_mask=mask).logits
    with padless.patch(model) as handle:
        got = model(input_ids=ids, attention_mask=mask).logits
        assert "forward" not in vars(model)
    assert handle.report().forwards == 1
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
