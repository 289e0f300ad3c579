"""What each rank of a pool does for the tests of shared sequences together with something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import padless
from golden.models import build_model
from padless.parallel import Shard
from sequence.attention_jobs import mesh
from sequence.model_jobs import Step, average, model_of, own_loss, step_of

Batch = dict[str, Any]


def with_adapters(model: Any, reentrant: bool | None = None) -> Any:
    """A model with LoRA on projections of attention and MLP, whose weights are not zero."""
    from peft import LoraConfig, get_peft_model

    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    made: Any = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_alpha=8))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sorted(made.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(drawn * 0.2)
    return made.double().train()


def _one_layer() -> Any:
    return model_of(num_hidden_layers=1)


def compiled(model: Any, backend: str) -> Any:
    """A model whose layers are compiled, each by itself."""
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def alone(kind: str, batch: Batch) -> Step:
    """The step of one process."""
    model = MAKERS[kind]()
    with padless.patch(model):
        return _step(kind, model, batch)


def shared(kind: str, algorithm: str, when: str, batch: Batch) -> Step:
    """The step of the ranks of a group; the patch comes before what is made of the model, or after.

    Gradients are averaged by hand.
    """
    made: list[Any] = []

    def patch(model: Any) -> Any:
        made.append(padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm))
        return model

    model = MAKERS[kind](patch) if when == "before" else patch(MAKERS[kind]())
    found = average(_step(kind, model, batch))
    report = made[0].report()
    return {**found, "forwards": report.forwards, "left": report.stock | report.whole}


def _step(kind: str, model: Any, batch: Batch) -> Step:
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if not kind.startswith("compiled"):
            return step_of(model, batch, reads_logits=False)
        counters.clear()
        if kind == "compiled for any length":
            # The second length is the one for which sizes become symbols.
            step_of(model, {name: x[:2] for name, x in batch.items()}, reads_logits=False)
        found = step_of(model, batch, reads_logits=False)
    found["graphs"] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return found


def _plain(model: Any) -> Any:
    return model


Then = Callable[[Any], Any]
MAKERS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda then=_plain: with_adapters(then(model_of())),
    "LoRA, checkpointing": lambda then=_plain: with_adapters(then(model_of()), False),
    "LoRA, reentrant checkpointing": lambda then=_plain: with_adapters(then(model_of()), True),
    "compiled layers": lambda then=_plain: compiled(then(_one_layer()), "aot_eager"),
    # Traces with symbols take aot_eager half a minute.
    "compiled for any length": lambda then=_plain: compiled(then(_one_layer()), "eager"),
    "autocast": lambda then=_plain: then(build_model().train()),
}


def wrapped(
    algorithm: str, batches: list[Batch], wrapper: str, items: Tensor | None
) -> dict[str, Tensor]:
    """Gradients under DDP or FSDP2 on a mesh of data by sequence; a batch a data rank.

    Args:
        algorithm: of the patch.
        batches: one for each data rank.
        wrapper: "ddp"; "fsdp data", which shards weights over the data ranks alone; "fsdp both",
            which shards over them and replicates over the sequence's.
        items: labels of all batches, for a loss that is normalised by them.
    """
    ranks = len(batches)
    grid = init_device_mesh("cpu", (ranks, 2), mesh_dim_names=("data", "sequence"))
    model = model_of()
    if wrapper != "ddp":
        _shard_weights(model, grid, over_both=wrapper == "fsdp both")
    padless.patch(model, sequence_mesh=grid["sequence"], sequence_parallel=algorithm)
    run = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else model
    batch = dict(batches[grid.get_local_rank("data")])
    if items is not None:
        batch["num_items_in_batch"] = items
    loss = run(**batch, return_dict=True).loss
    # The mean over ranks is undone where the loss is a share of a sum: over those of data alone.
    (loss * (1 if items is None else ranks)).backward()
    found = {}
    for name, weight in model.named_parameters():
        grad: Any = weight.grad
        assert grad is not None, name
        if wrapper == "fsdp data":
            dist.all_reduce(grad.to_local(), group=grid.get_group("sequence"))
            grad = grad / 2
        found[name] = grad if wrapper == "ddp" else grad.full_tensor()
    return found


def _shard_weights(model: Any, grid: Any, *, over_both: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    over = grid["data"]
    if over_both:
        # The first dimension replicates, the second shards.
        over = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=over)
    fully_shard(model, mesh=over)


def fsdp_step(
    algorithm: str, when: str, batch: Batch, options: dict[str, Any], own: bool
) -> dict[str, Any]:
    """A step under FSDP2 over all ranks, how often tokens were collected, and the logits then.

    Args:
        algorithm: of the patch.
        when: whether the patch comes "before" FSDP2 or "after" it.
        batch: of every rank.
        options: of FSDP2.
        own: whether the loss is one of the caller's, made of logits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": mesh(), "mp_policy": MixedPrecisionPolicy(**options)}
    model = model_of()
    for turn in ("before", "fsdp", "after"):
        if turn == when:
            padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm)
        elif turn == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer, **options)
            fully_shard(model, **options)
    with mock.patch.object(Shard, "gather", autospec=True, side_effect=Shard.gather) as gather:
        out = model(**batch, return_dict=True)
        silent = gather.call_count
        (own_loss(out.logits, batch) if own else out.loss).backward()
        logits = out.logits.detach()
        read = gather.call_count
    grads: Any = {name: weight.grad for name, weight in model.named_parameters()}
    gradients = {name: grad.full_tensor() for name, grad in grads.items()}
    left = len(model._forward_hooks)
    found = {"collected": (silent, read), "hooks": left, "logits": logits, "gradients": gradients}
    # One that FSDP2 may have made another dtype.
    return found if own else {**found, "loss": out.loss.detach().float()}


def generated(algorithm: str, when: str, batch: Batch, options: dict[str, Any]) -> Any:
    """Tokens of generate in training's mesh, before and under the patch, behind a step of it."""
    model = model_of()
    wanted: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, **options}
    before = model.eval().generate(**batch, **wanted)
    handle = padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm)
    if when == "between steps":
        first = step_of(model.train(), {**batch, "labels": batch["input_ids"]}, reads_logits=False)
    after = model.eval().generate(**batch, **wanted)
    is_same = True
    if when == "between steps":
        again = step_of(model.train(), {**batch, "labels": batch["input_ids"]}, reads_logits=False)
        is_same = torch.equal(first["loss"], again["loss"])
    report = handle.report()
    return before, after, is_same, bool(report.whole or report.generations)
