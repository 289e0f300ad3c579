"""`device_map` and its hooks: layers on devices of their own, weights from the CPU or a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from transformers import LlamaForCausalLM

import padless
from golden.models import LAYERS, batch, build_model, judge, truth_logits
from golden.steps import judge_step_of, step_of

CPU = torch.device("cpu")


def _spread(model: Any) -> None:
    """The hooks that `device_map` puts in front of each layer, here all of one device."""
    blocks = [f"model.layers.{index}" for index in range(LAYERS)]
    blocks += ["model.embed_tokens", "model.norm", "lm_head"]
    attach_align_device_hook_on_blocks(
        model, execution_device={"": CPU, **dict.fromkeys(blocks, CPU)}, offload=False
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_step_of_a_model_spread_over_devices(when: str) -> None:
    stock = step_of(build_model().train(), "left")
    model = build_model().train()
    if when == "after":
        _spread(model)
    handle = padless.patch(model)
    if when == "before":
        _spread(model)
    got = step_of(model, "left", use_cache=False)
    report = handle.report()
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)
    judge_step_of(build_model(), "left", got, stock)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
@torch.no_grad()
def test_forward_of_an_offloaded_model(kind: str, when: str, tmp_path: Path) -> None:
    def offload(model: Any) -> None:
        if kind == "cpu":
            cpu_offload(model, execution_device=CPU)
        else:
            disk_offload(model, str(tmp_path), execution_device=CPU)

    ids, real = batch("left")

    def run(model: Any) -> Tensor:
        logits: Tensor = model(ids, attention_mask=real.long(), use_cache=False).logits
        return logits

    plain = build_model()
    stock = run(plain)
    model = build_model()
    if when == "after":
        offload(model)
    handle = padless.patch(model)
    if when == "before":
        offload(model)
    # Weights are elsewhere but for the time that their module runs.
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    got = run(model)
    report = handle.report()
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)
    judge("logits", got[real], stock[real], truth_logits(plain, ids, real)[real])


@pytest.mark.parametrize("kind", ["left", "none"])
@torch.no_grad()
def test_device_map_over_the_cpu_and_a_disk(kind: str, tmp_path: Path) -> None:
    plain = build_model()
    plain.save_pretrained(tmp_path / "model")
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=spread, offload_folder=str(tmp_path / "weights")
    ).eval()
    devices = [layer.self_attn.q_proj.weight.device.type for layer in model.model.layers]
    assert devices == ["cpu", "meta"]
    ids, real = batch(kind)
    given = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    stock = model(**given).logits
    with padless.patch(model) as handle:
        got = model(**given).logits
        report = handle.report()
    assert (report.forwards, report.stock, len(report.layers)) == (1, {}, LAYERS)
    judge("logits", got[real], stock[real], truth_logits(plain, ids, real)[real])
    assert torch.equal(model(**given).logits, stock)
