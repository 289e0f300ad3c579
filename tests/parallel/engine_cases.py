"""A training step under each engine, on every rank: of the stock model and of the patched one.

Ranks hold rows of one global batch with very different numbers of real tokens. The loss is
normalised as the stock trainer does it: each rank's sum over the global number of labels, times the
ranks where the engine averages gradients over them.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import padless
from golden.models import VOCAB, build_model
from golden.steps import IGNORED, labels_of
from parallel.engines import ENGINES
from parallel.group import Place

SEQLEN, ROWS = 13, 2


class RankStep(NamedTuple):
    """What a step gave on one rank.

    Attributes:
        loss: this rank's sum over the global number of labels.
        logits: `(rows, seqlen, vocab)` of this rank.
        gradients: of the whole model, by parameter.
        forwards: that ran on real tokens.
        stock: calls that the patch left to transformers, by reason.
        layers: attention layers that were served.
    """

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    forwards: int
    stock: dict[str, int]
    layers: int


def global_batch(size: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ids, a bool mask and labels, `(ROWS * size, SEQLEN)` each.

    Args:
        size: ranks.
        kind: "uneven", where later ranks have fewer real tokens, "empty", where the last one has
            none, or "left", where padding is on the left.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (ROWS * size, SEQLEN), generator=generator)
    columns = torch.arange(SEQLEN)
    lengths = (torch.linspace(SEQLEN, 3, ROWS * size)).long()[:, None]
    real = columns >= SEQLEN - lengths if kind == "left" else columns < lengths
    if kind == "empty":
        real[-ROWS:] = False
    ids = ids.masked_fill(~real, 0)
    return ids, real, labels_of(ids, real)


def step(
    place: Place, engine: str, *, kind: str, when: str, baseline: str | None = None
) -> tuple[RankStep, RankStep]:
    """Runs the stock and the patched step under an engine.

    Args:
        place: of this process.
        engine: a key of `ENGINES`.
        kind: of `global_batch`; or "packed", which is "uneven" without its padding, in one row.
        when: whether the model is patched "before" or "after" the engine wraps it, or the
            "process" is.
        baseline: the engine of the stock model, if it is another one.
    """
    return (
        _step(place, baseline or engine, kind, "never"),
        _step(place, engine, kind, when),
    )


def _step(place: Place, engine: str, kind: str, when: str) -> RankStep:
    wrap, shares_batch = ENGINES[engine]
    ids, real, labels = global_batch(place.size, kind)
    items = (labels[:, 1:] != IGNORED).sum()
    if not shares_batch:
        mine = slice(ROWS * place.rank, ROWS * (place.rank + 1))
        ids, real, labels = ids[mine], real[mine], labels[mine]
    with contextlib.ExitStack() as stack:
        plain = build_model().train()
        handle = None
        if when == "process":
            handle = stack.enter_context(padless.patch_llama())
        elif when == "before":
            handle = padless.patch(plain)
        model = wrap(plain, place)
        if when == "after":
            handle = padless.patch(model)
        batch = _arguments(ids, real, labels, is_packed=kind == "packed" and handle is not None)
        out = model(**batch, num_items_in_batch=items, use_cache=False)
        # Gradients are averaged over ranks that do not share the batch.
        loss = out.loss * (1 if shares_batch else place.size)
        # DeepSpeed has a backward of its own.
        getattr(model, "backward", torch.Tensor.backward)(loss)
        report = handle.report() if handle is not None else None
        logits = out.logits.detach().float()
        if logits.shape[:2] != ids.shape:
            packed, logits = logits, torch.zeros(*ids.shape, VOCAB)
            logits[real] = packed[0]
        return RankStep(
            out.loss.detach(),
            logits,
            _whole_gradients(model),
            report.forwards if report else 0,
            dict(report.stock) if report else {},
            len(report.layers) if report else 0,
        )


def _arguments(ids: Tensor, real: Tensor, labels: Tensor, *, is_packed: bool) -> dict[str, Any]:
    if not is_packed:
        return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    rows = zip(ids, real, labels, strict=True)
    return padless.PackingCollator()([{"input_ids": i[r], "labels": t[r]} for i, r, t in rows])


def _whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    whole = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    read = operator.attrgetter("grad")
    if hasattr(model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_grad as read
    with whole:
        gradients = {}
        for name, weight in model.named_parameters():
            grad = read(weight)
            assert grad is not None, f"no gradient of {name}"
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            gradients[name] = grad.detach().float().clone()
    return gradients
