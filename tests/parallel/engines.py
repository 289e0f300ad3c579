"""The engines that wrap a model, each with the options that users set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from golden.steps import IGNORED
from parallel.group import Place

Wrap = Callable[..., Any]


def _ddp(model: nn.Module, place: Place, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def _ddp_by_local_count(model: nn.Module, place: Place) -> nn.Module:
    """The planted fault: each rank normalises by its own labels, and the mean of means is taken."""
    inner = model.forward

    def forward(**arguments: Any) -> Any:
        local = (arguments["labels"][:, 1:] != IGNORED).sum()
        return inner(**{**arguments, "num_items_in_batch": local * place.size})

    model.forward = forward
    return nn.parallel.DistributedDataParallel(model)


def _ddp_by_count(model: nn.Module, place: Place) -> nn.Module:
    """The planted fault: a collective that only ranks with enough real tokens take part in."""
    group = dist.new_group()

    def gather(module: nn.Module, args: Any, arguments: dict[str, Any]) -> None:
        mask = arguments["attention_mask"]
        if mask.sum() > mask.numel() // 2:
            dist.all_reduce(torch.zeros(1), group=group)

    model.register_forward_pre_hook(gather, with_kwargs=True)
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: Any, place: Place, *, with_body: bool = False, **options: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=place.mesh, **options)
    if with_body:
        fully_shard(model.model, mesh=place.mesh, **options)
    return fully_shard(model, mesh=place.mesh, **options)


def _fsdp1(model: Any, place: Place, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        **options,
    )


def _tensor_parallel(model: Any, place: Place) -> nn.Module:
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = model.config.base_model_tp_plan.items()
    return parallelize_module(
        model, place.mesh, {f"model.{name}": styles[style]() for name, style in plan}
    )


def _transformers_tensor_parallel(model: Any, place: Place) -> nn.Module:
    from transformers.distributed import DistributedConfig

    folder = place.folder / "stock"
    if place.rank == 0 and not folder.exists():
        model.save_pretrained(folder)
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=place.size)
    ).train()


def _deepspeed(model: Any, place: Place, *, stage: int) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # An operation of its own for collectives, which it would compile: gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        # Every weight is in parts, small ones too.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def _checkpointing(wrap: Wrap, **options: Any) -> Wrap:
    def wrapped(model: Any, place: Place) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return wrap(model, place, **options)

    return wrapped


def _with(wrap: Wrap, **options: Any) -> Wrap:
    def wrapped(model: Any, place: Place) -> nn.Module:
        return wrap(model, place, **options)

    return wrapped


_BF16_2 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_BF16_1 = MixedPrecision(
    param_dtype=torch.bfloat16,
    reduce_dtype=torch.float32,
    cast_forward_inputs=True,
    cast_root_forward_inputs=True,
)
# FSDP1 pins what it offloads, for which there has to be a GPU.
_OFFLOAD = CPUOffloadPolicy(pin_memory=False)
# How a model is wrapped, and whether all ranks hold the whole batch.
ENGINES: dict[str, tuple[Wrap, bool]] = {
    "ddp": (_ddp, False),
    "ddp, unused": (_with(_ddp, find_unused_parameters=True), False),
    "ddp, static": (_with(_ddp, static_graph=True), False),
    "ddp, checkpointing": (_checkpointing(_ddp), False),
    "fsdp2": (_fsdp2, False),
    "fsdp2, kept": (_with(_fsdp2, reshard_after_forward=False), False),
    "fsdp2, bfloat16": (_with(_fsdp2, mp_policy=_BF16_2), False),
    "fsdp2, bfloat16, body": (_with(_fsdp2, mp_policy=_BF16_2, with_body=True), False),
    "fsdp2, offload": (_with(_fsdp2, offload_policy=_OFFLOAD), False),
    "fsdp2, checkpointing": (_checkpointing(_fsdp2), False),
    "fsdp1": (_fsdp1, False),
    "fsdp1, bfloat16": (_with(_fsdp1, mixed_precision=_BF16_1), False),
    "deepspeed, zero 2": (_with(_deepspeed, stage=2), False),
    "deepspeed, zero 3": (_with(_deepspeed, stage=3), False),
    "tensor parallel, torch": (_tensor_parallel, True),
    "tensor parallel, transformers": (_transformers_tensor_parallel, True),
    "fault: local count": (_ddp_by_local_count, False),
    "fault: collective by count": (_ddp_by_count, False),
}
