"""A patched model inside what trains models: checkpoints, autocast, LoRA, hooks, Liger, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import padless
from golden.models import LAYERS, batch, build_model, judge, since
from golden.steps import (
    Step,
    assert_steps_close,
    judge_step_of,
    labels_of,
    step_of,
    truth_step,
    unpadding,
)

pytestmark = pytest.mark.case("patch")


KINDS_OF_CHECKPOINT = [
    pytest.param(None, id="default"),
    pytest.param(True, id="reentrant", marks=since("4.35", "the choice of kind")),
    pytest.param(False, id="non-reentrant", marks=since("4.35", "the choice of kind")),
]


def _enable_checkpointing(model: Any, use_reentrant: bool | None) -> None:
    if use_reentrant is None:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant is not False:
        # Reentrant checkpoints need an input that requires grad.
        model.enable_input_require_grads()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("use_reentrant", KINDS_OF_CHECKPOINT)
def test_gradient_checkpointing(padding: str, use_reentrant: bool | None) -> None:
    model = build_model().train()
    stock = step_of(model, padding)
    _enable_checkpointing(model, use_reentrant)
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    with unpadding(model):
        got = step_of(model, padding, use_cache=False)
    # Once forward and once more in the backward: the checkpoint was at work.
    assert len(calls) == 2
    judge_step_of(model, padding, got, stock)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "the other way"])
@pytest.mark.parametrize("use_reentrant", KINDS_OF_CHECKPOINT)
def test_two_batches_before_their_backward(
    use_reentrant: bool | None, order: tuple[int, int]
) -> None:
    # As pipelines do: a checkpoint computes again what belongs to a batch before the last one.
    model = build_model().train()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for padding, seqlen in (("left", 13), ("right", 17)):
            ids, real = batch(padding, seqlen=seqlen)
            labels = labels_of(ids, real)
            losses.append(model(ids, attention_mask=real.long(), labels=labels, use_cache=False)[0])
        for number in order:
            losses[number].backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    stock = run()
    _enable_checkpointing(model, use_reentrant)
    with unpadding(model):
        got = run()
    for name, gradient in stock.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_autocast(padding: str) -> None:
    model = build_model().train()

    def run() -> Step:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step_of(model, padding)

    stock = run()
    with unpadding(model):
        got = run()
    assert got.logits.dtype == stock.logits.dtype
    ids, real = batch(padding)
    truth = truth_step(model, ids, real, labels_of(ids, real))
    # One number, the loss, may be right by chance: its roundings are those of the logits.
    torch.testing.assert_close(got.loss, stock.loss, rtol=5e-3, atol=0.0)
    judge("logits", got.logits[real], stock.logits[real], truth.logits[real])
    for name, gradient in got.gradients.items():
        judge(name, gradient, stock.gradients[name], truth.gradients[name])


def test_grad_scaler() -> None:
    model = build_model().train()
    ids, real = batch("left")
    stock = step_of(model, "left")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.zero_grad()
    with unpadding(model):
        loss = model(ids, attention_mask=real.long(), labels=labels_of(ids, real))[0]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    judge_step_of(
        model, "left", Step(loss.detach(), stock.logits * real[..., None], gradients), stock
    )


def _peft() -> Any:
    try:
        import peft
    except Exception as error:
        pytest.skip(f"no PEFT for this transformers here: {type(error).__name__}")
    return peft


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_lora(when: str, padding: str, base: str) -> None:
    peft = _peft()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )

    def adapted(model: nn.Module) -> nn.Module:
        model = peft.get_peft_model(model, config).train()
        generator = torch.Generator().manual_seed(3)
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.2
        return model

    def run(model: nn.Module) -> Step:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=base == "bfloat16"):
            return step_of(model, padding)

    dtype = getattr(torch, base)
    unpatched = adapted(build_model().to(dtype))
    stock = run(unpatched)
    model = build_model().to(dtype)
    if when == "after":
        model = adapted(model)
    with padless.patch(model) as handle:
        if when == "before":
            model = adapted(model)
        got = run(model)
        assert handle.report().forwards == 1 and len(handle.report().layers) == LAYERS
    assert stock.gradients and all("lora_" in name for name in stock.gradients)
    if base == "float32":
        assert_steps_close(got, stock)
        return
    truth = step_of(copy.deepcopy(unpatched).float(), padding)
    assert got.gradients.keys() == stock.gradients.keys()
    for name, gradient in got.gradients.items():
        judge(name, gradient, stock.gradients[name], truth.gradients[name].double())


def test_noise_on_the_embedding() -> None:
    # As NEFTune adds it: a hook that draws for the padded shape, by its lengths.
    model = build_model().train()

    def add_noise(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        bound = 5.0 / (out.shape[1] * out.shape[2]) ** 0.5
        return out + torch.zeros_like(out).uniform_(-bound, bound)

    quiet = step_of(model, "left")
    model.model.embed_tokens.register_forward_hook(add_noise)

    def run() -> Step:
        torch.manual_seed(3)
        return step_of(model, "left")

    stock = run()
    with unpadding(model):
        got = run()
    assert_steps_close(got, stock)
    assert (got.loss - quiet.loss).abs() > 1e-3


@pytest.fixture
def _one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("unused", [False, True])
def test_ddp(when: str, unused: bool) -> None:
    model = build_model().train()
    stock = step_of(model, "left")
    handle = padless.patch(model) if when == "before" else None
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    handle = handle or padless.patch(ddp)
    got = step_of(ddp, "left")
    assert handle.report().forwards == 1
    got = got._replace(gradients={n.removeprefix("module."): g for n, g in got.gradients.items()})
    judge_step_of(model, "left", got, stock)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Callable[[], Any]) -> None:
    model = build_model()
    ids, real = batch("mixed")
    with guard():
        stock = model(ids, attention_mask=real.long(), return_dict=True).logits
        with unpadding(model):
            got = model(ids, attention_mask=real.long(), return_dict=True).logits
    torch.testing.assert_close(got[real], stock[real], atol=1e-4, rtol=1e-4)
