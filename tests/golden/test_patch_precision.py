"""Models whose parts are of several dtypes, as adapters and quantisation make them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padless
from golden.models import batch, build_model, judge
from golden.steps import Step, assert_steps_close, labels_of, step_of, truth_step, unpadding

pytestmark = pytest.mark.case("patch")


def _under_autocast(model: nn.Module, dtype: torch.dtype, padding: str) -> Step:
    with torch.autocast("cpu", dtype=dtype):
        return step_of(model, padding)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("base", ["bfloat16", "float16"])
def test_norms_and_head_in_float32_under_autocast(padding: str, base: str) -> None:
    # As PEFT prepares a model for training in few bits.
    dtype = getattr(torch, base)
    model = build_model().to(dtype).train()
    for name, module in model.named_modules():
        if "norm" in name or name == "lm_head":
            module.float()
    stock = _under_autocast(model, dtype, padding)
    attended: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: attended.append(args[0].dtype)
        )
    with unpadding(model):
        got = _under_autocast(model, dtype, padding)
    # Neither in float32, which costs the fast kernels, nor in another half type.
    assert set(attended) == {dtype}
    assert got.logits.dtype == stock.logits.dtype
    ids, real = batch(padding)
    truth = truth_step(copy.deepcopy(model).float(), ids, real, labels_of(ids, real))
    judge("logits", got.logits[real], stock.logits[real], truth.logits[real])
    for name, gradient in got.gradients.items():
        assert gradient.dtype == stock.gradients[name].dtype, name
        judge(name, gradient, stock.gradients[name], truth.gradients[name])


class _FourBits(nn.Module):
    """A frozen product whose weight is packed, as bitsandbytes' is: its dtype says nothing."""

    def __init__(self, linear: nn.Linear, computes_in: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.computes_in, self.bias = computes_in, None
        self.scale = float(linear.weight.detach().abs().max()) / 7
        packed = (linear.weight.detach() / self.scale).round().add(8).to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = ((self.weight.float() - 8) * self.scale).to(self.computes_in)
        return F.linear(x.to(self.computes_in), weight).to(x.dtype)


def _quantised(computes_in: torch.dtype, *parts: str) -> Any:
    model = build_model().train()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in parts:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _FourBits(module, computes_in))
    return model


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"), id="all"),
        pytest.param(("k_proj",), id="one-of-three"),
    ],
)
@pytest.mark.parametrize("computes_in", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_four_bits(parts: tuple[str, ...], computes_in: torch.dtype) -> None:
    model = _quantised(computes_in, *parts)
    stock = step_of(model, "left")
    with unpadding(model):
        got = step_of(model, "left")
    if computes_in == torch.float32:
        assert_steps_close(got, stock)
        return
    # The same packed weights, multiplied in float32: what both are off by is the half type's.
    exact = step_of(_quantised(torch.float32, *parts), "left")
    assert got.gradients.keys() == stock.gradients.keys() and got.gradients
    _, real = batch("left")
    judge("logits", got.logits[real], stock.logits[real], exact.logits[real].double())
    for name, gradient in got.gradients.items():
        judge(name, gradient, stock.gradients[name], exact.gradients[name].double())


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_with_weights_of_four_bits(padding: str) -> None:
    model = _quantised(torch.bfloat16, "q_proj", "k_proj", "v_proj", "o_proj").eval()
    ids, real = batch(padding)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def run() -> Tensor:
        return model.generate(input_ids=ids, attention_mask=real.long(), **options)

    want = run()
    with padless.patch(model):
        assert torch.equal(run(), want)
