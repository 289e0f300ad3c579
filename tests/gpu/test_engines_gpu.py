"""Engines that need a GPU: FSDP1 with weights on the CPU, and `device_map` over devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import padless
from golden.models import LAYERS, batch, build_model
from golden.steps import labels_of

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _arguments(padding: str, device: str) -> tuple[dict[str, Any], Tensor]:
    ids, real = (x.to(device) for x in batch(padding))
    labels = labels_of(ids, real)
    given = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    return {**given, "use_cache": False}, real


def _assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def _trained(when: str) -> tuple[list[Tensor], Any]:
    """Losses and last logits of two steps, the second of which has seen the first's gradients."""
    model: Any = build_model().train()
    handle = padless.patch(model) if when == "before" else None
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=True,
        cpu_offload=CPUOffload(offload_params=True),
        device_id=torch.device(CUDA),
    )
    if when == "after":
        handle = padless.patch(model)
    given, real = _arguments("left", CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(2):
        assert all(weight.device.type == "cpu" for weight in model.parameters())
        out = model(**given)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.detach())
    return [*found, out.logits.detach()[real]], handle


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp1_with_weights_on_the_cpu(when: str) -> None:
    stock, _ = _trained("never")
    got, handle = _trained(when)
    assert (stock[0] - stock[1]).abs() > 1e-2
    for each, want in zip(got, stock, strict=True):
        _assert_near(each, want)
    report = handle.report()
    assert (report.forwards, report.stock, len(report.layers)) == (2, {}, LAYERS)


@pytest.mark.parametrize(
    ("second", "last"), [("cuda:1", CUDA), ("cuda:1", "cuda:1"), ("cpu", CUDA)]
)
def test_device_map_over_two_devices(second: str, last: str, tmp_path: Path) -> None:
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    build_model().save_pretrained(tmp_path)
    spread = {"model.embed_tokens": CUDA, "model.layers.0": CUDA, "model.layers.1": second}
    spread |= {"model.norm": last, "model.rotary_emb": CUDA, "lm_head": last}
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map=spread)
    # Weights on the CPU are copied to the GPU for the time that their layer runs.
    trains = second != "cpu"
    given, real = _arguments("left", CUDA)

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(trains):
            out = model(**given)
        found = [out.loss.detach().to(CUDA), out.logits.detach().to(CUDA)[real]]
        if trains:
            out.loss.backward()
            found += [weight.grad.to(CUDA) for weight in model.parameters()]
        return found

    stock = step()
    with padless.patch(model) as handle:
        got = step()
        report = handle.report()
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)
    for each, want in zip(got, stock, strict=True):
        _assert_near(each, want)
