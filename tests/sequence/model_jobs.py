"""What each rank of a pool does for the tests of `patch(model, sequence_mesh=...)`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import padless
from golden.models import build_model
from sequence.attention_jobs import mesh

Step = dict[str, Any]


def model_of(heads: tuple[int, int] = (4, 2), **config: Any) -> Any:
    """The same model in every process, in float64."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 64}
    return build_model("gqa", **sizes, **config).double().train()


def step_of(model: Any, batch: dict[str, Tensor], *, reads_logits: bool) -> Step:
    """One step of a model: loss, gradients, and logits if they are read."""
    model.zero_grad(set_to_none=True)
    out = model(**batch, return_dict=True)
    found: Step = {"loss": out.loss.detach()}
    if reads_logits:
        found["logits"] = out.logits.detach()
    out.loss.backward()
    found["gradients"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


def average(found: Step) -> Step:
    """Averages gradients over all ranks, in place."""
    for gradient in found["gradients"].values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return found


def step(
    algorithm: str,
    batch: dict[str, Tensor],
    heads: tuple[int, int] = (4, 2),
    reads_logits: bool = True,
    checkpoints: bool | None = None,
) -> Step:
    """A step whose gradients are averaged by hand."""
    model = model_of(heads)
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        model.enable_input_require_grads()
    handle = padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm)
    found = average(step_of(model, batch, reads_logits=reads_logits))
    report = handle.report()
    found |= {"computed": report.computed_tokens, "stock": report.stock, "whole": report.whole}
    found |= {"skipped": report.skipped_tokens, "shared": report.sequence_parallel}
    found |= {"taken": report.shared, "said": str(report)}
    found["backends"] = [layer.backends for layer in report.layers]
    return found


def alternating(batches: list[dict[str, Tensor]], heads: tuple[int, int], backend: str) -> Any:
    """Steps of one model that takes what is best for each batch; what it took, and its words."""
    model = model_of(heads)
    handle = padless.patch(model, sequence_mesh=mesh(), backend=backend)
    found, taken = [], []
    for batch in batches:
        before = handle.report().shared
        found.append(average(step_of(model, batch, reads_logits=True)))
        after = handle.report().shared
        taken += [name for name in after if after[name] != before.get(name, 0)]
    return found, taken, str(handle.report())


def mean_of_logits(algorithm: str, batch: dict[str, Tensor]) -> Step:
    """Gradients of a loss of the caller's own, made of logits that are read."""
    model = model_of()
    padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm)
    out = model(**batch, return_dict=True)
    own_loss(out.logits, batch).backward()
    return average({"gradients": {n: p.grad for n, p in model.named_parameters()}})


def own_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """A number of all real logits."""
    return (logits.sin() * batch["attention_mask"].unsqueeze(-1)).sum() / 100


def hidden_states(algorithm: str, batch: dict[str, Tensor]) -> list[Tensor]:
    """What the model without a head gives."""
    model = model_of()
    with torch.no_grad(), padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm):
        out = model.model(**batch, output_hidden_states=True, return_dict=True)
    return [out.last_hidden_state, *out.hidden_states]


def changed_logits(algorithm: str, batch: dict[str, Tensor], at: list[int]) -> list[Tensor]:
    """Where logits change if one token does, for each of some tokens."""
    model = model_of()
    with torch.no_grad(), padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm):
        before = model(**batch).logits
        found = []
        for place in at:
            ids = batch["input_ids"].clone()
            ids.view(-1)[place] = (ids.view(-1)[place] + 11) % 90 + 3
            after = model(**{**batch, "input_ids": ids}).logits
            found.append((before != after).any(-1))
    return found


def wrapped_step(
    algorithm: str, batches: list[dict[str, Tensor]], wrapper: str
) -> dict[str, Tensor]:
    """Gradients under DDP or FSDP over all ranks, which are data by sequence; a batch a data rank.

    Args:
        algorithm: of the patch.
        batches: one for each data rank.
        wrapper: "ddp"; "fsdp before" or "fsdp after" the patch.
    """
    grid = init_device_mesh("cpu", (len(batches), 2), mesh_dim_names=("data", "sequence"))
    model = model_of()
    if wrapper == "fsdp before":
        _shard_weights(model)
    padless.patch(model, sequence_mesh=grid["sequence"], sequence_parallel=algorithm)
    if wrapper == "fsdp after":
        _shard_weights(model)
    run = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else model
    batch = batches[grid.get_local_rank("data")]
    run(**batch, return_dict=True).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {n: g if wrapper == "ddp" else g.full_tensor() for n, g in grads.items()}


def _shard_weights(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())


def generated(algorithm: str, batch: dict[str, Tensor], options: dict[str, Any]) -> Any:
    """Tokens of generate, before and under the patch, and what was said of it."""
    model = model_of().eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    before = model.generate(**batch, **options)
    with padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm) as handle:
        after = model.generate(**batch, **options)
        return before, after, handle.report().whole, handle.report().generations


def cached(algorithm: str, batch: dict[str, Tensor]) -> Any:
    """A call that asks for a cache."""
    model = model_of().eval()
    with torch.no_grad():
        before = model(**batch, use_cache=True)
        with padless.patch(model, sequence_mesh=mesh(), sequence_parallel=algorithm) as handle:
            after = model(**batch, use_cache=True)
            silent = model(**batch)
            whole = handle.report().whole
    kept = after.past_key_values.get_seq_length() == before.past_key_values.get_seq_length()
    return kept, silent.past_key_values is None, whole


def copied_and_undone(batch: dict[str, Tensor]) -> tuple[bool, bool]:
    """A copy of a patched model is shared out too; an undone one is as before."""
    model = model_of()
    before = step_of(model, batch, reads_logits=True)
    handle = padless.patch(model, sequence_mesh=mesh(), sequence_parallel="ring")
    shared = step_of(copy.deepcopy(model), batch, reads_logits=False)["loss"]
    handle.undo()
    after = step_of(model, batch, reads_logits=True)
    same = torch.equal(before["logits"], after["logits"]) and all(
        torch.equal(g, after["gradients"][n]) for n, g in before["gradients"].items()
    )
    return torch.allclose(shared, before["loss"]), same


def message(kind: str, batch: dict[str, Tensor]) -> str:
    """What is said of a mistake."""
    model = model_of((2, 1)) if kind == "heads" else model_of()
    options: dict[str, Any] = {"sequence_mesh": mesh()}
    try:
        if kind == "two dimensions":
            options["sequence_mesh"] = init_device_mesh("cpu", (dist.get_world_size(), 1))
        elif kind == "no mesh":
            options["sequence_mesh"] = 2
        elif kind == "heads":
            options["sequence_parallel"] = "ulysses"
        elif kind == "algorithm":
            options["sequence_parallel"] = "zigzag"
        elif kind == "rope":
            scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            model = model_of(rope_scaling=scaling)
        padless.patch(model, **options)
        if kind == "other batch" and dist.get_rank():
            batch = {**batch, "input_ids": batch["input_ids"] + 1}
        model(**batch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
