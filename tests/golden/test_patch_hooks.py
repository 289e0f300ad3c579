"""Hooks on a patched model, forwards that are put in front of its own, and Liger's."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import padless
from golden.models import LAYERS, batch, build_model
from golden.steps import Step, assert_steps_close, judge_step_of, labels_of, step_of, unpadding

pytestmark = pytest.mark.case("patch")


def _hook_layers(model: nn.Module) -> None:
    for module in (model, model.model, *(layer.self_attn for layer in model.model.layers)):
        add_hook_to_module(module, ModelHook())


def _offload(model: nn.Module) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("hook", [_hook_layers, _offload])
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_hooks_of_accelerate(hook: Callable[[nn.Module], None], when: str) -> None:
    model = build_model()
    ids, real = batch("left")

    def run() -> Tensor:
        return model(ids, attention_mask=real.long(), return_dict=True).logits

    stock = run()
    if when == "before":
        hook(model)
    handle = padless.patch(model)
    if when == "after":
        hook(model)
    got = run()
    report = handle.report()
    assert report.forwards == 1 and len(report.layers) == LAYERS
    torch.testing.assert_close(got[real], stock[real], atol=1e-4, rtol=1e-4)
    handle.undo()
    assert torch.equal(run(), stock)
    assert handle.report().forwards == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_hooks_on_projections_see_what_these_gave(mode: str) -> None:
    model = build_model().train(mode == "train")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)})
        )
    with unpadding(model):
        step_of(model, "left")
    for name, (hidden, out) in seen.items():
        # Kept by reference, and looked at when all is over.
        torch.testing.assert_close(out, F.linear(hidden, getattr(attention, name).weight))


def test_backward_hooks_on_projections() -> None:
    model = build_model().train()
    stock = step_of(model, "left")
    seen = []
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).register_full_backward_hook(
                lambda module, inputs, outputs: seen.append(outputs[0])
            )
    with unpadding(model):
        got = step_of(model, "left")
    assert len(seen) == 2 * LAYERS and all(gradient.isfinite().all() for gradient in seen)
    judge_step_of(model, "left", got, stock)


def _liger_forward(self: Any, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
    """Computes a loss without logits, as Liger's fused loss does in training."""
    labels = kwargs.pop("labels")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("return_dict", "use_cache")}
    hidden = self.model(input_ids=input_ids, return_dict=True, **kwargs)[0]
    logits = self.lm_head(hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=None)


# As if it were written there: its globals say so.
_liger_forward = FunctionType(
    _liger_forward.__code__,
    {**globals(), "__name__": "liger_kernel.transformers.model.llama"},
    "lce_forward",
)


@pytest.mark.parametrize("when", ["before", "after"])
def test_forward_of_liger(when: str) -> None:
    model = build_model().train()
    ids, real = batch("left")
    labels = labels_of(ids, real)
    stock = step_of(model, "left")
    if when == "before":
        model.forward = MethodType(_liger_forward, model)
    heads = []
    model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape))
    handle = padless.patch(model)
    if when == "after":
        model.forward = MethodType(_liger_forward, model)

    def run() -> Step:
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=real.long(), labels=labels)
        out.loss.backward()
        assert out.logits is None
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        return Step(out.loss.detach(), stock.logits, gradients)

    assert_steps_close(run(), stock)
    assert_steps_close(run(), stock)
    # The head runs on real tokens too, at the latest from the second call on.
    assert heads[-1] == (1, int(real.sum()), 96)
    assert when == "after" or heads[0] == heads[-1]
    assert handle.report().forwards == 2
    handle.undo()
    assert model.forward.__func__ is _liger_forward
    assert_steps_close(run(), stock)
    assert heads[-1] == (*ids.shape, 96) and handle.report().forwards == 2
