"""Decoder layers split over ranks: a LLaMA as the stages of torch's pipelining."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import padless
from golden.models import VOCAB, build_model
from golden.steps import IGNORED
from parallel.engine_cases import SEQLEN, global_batch
from parallel.group import Place

_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """Some layers of a LLaMA, with the embedding in front of the first and the head behind all.

    Args:
        model: loses the other layers.
        rank: which stage.
        size: of all.
    """

    def __init__(self, model: Any, rank: int, size: int) -> None:
        super().__init__()
        self.is_first, self.is_last = rank == 0, rank == size - 1
        self.model = model.model
        per_stage = len(self.model.layers) // size
        self.model.layers = self.model.layers[per_stage * rank : per_stage * (rank + 1)]
        if not self.is_first:
            self.model.embed_tokens = None
        if not self.is_last:
            self.model.norm = nn.Identity()
        self.lm_head = model.lm_head if self.is_last else None

    def forward(self, source: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes hidden states of the next stage, or logits."""
        given = {"input_ids" if self.is_first else "inputs_embeds": source}
        out = self.model(**given, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return self.lm_head(hidden) if self.lm_head is not None else hidden


def step(
    place: Place, schedule: str, *, kind: str, when: str
) -> tuple[tuple[dict[str, Tensor], list[Tensor]], ...]:
    """Runs the stock and the patched step.

    Args:
        place: of this process, which is one stage.
        schedule: a key of `_SCHEDULES`.
        kind: of `global_batch`, whose rows are split into two microbatches.
        when: whether the model is patched "before" or "after" it is split.

    Returns:
        For each, the gradients of this rank by the whole model's names, and on the last rank the
        microbatches' losses.
    """
    return _step(place, schedule, kind, "never"), _step(place, schedule, kind, when)


def _step(
    place: Place, schedule: str, kind: str, when: str
) -> tuple[dict[str, Tensor], list[Tensor]]:
    ids, real, labels = global_batch(place.size, kind)
    items = (labels[:, 1:] != IGNORED).sum()
    model = build_model(num_hidden_layers=2).train()
    names = {id(weight): name for name, weight in model.named_parameters()}
    handle = padless.patch(model) if when == "before" else None
    submodule = Stage(model, place.rank, place.size)
    if when == "after":
        handle = padless.patch(submodule)
    rows = len(ids) // 2
    hidden = torch.zeros(rows, SEQLEN, model.config.hidden_size, requires_grad=True)
    # Said beforehand: torch would run the stage on the meta device to learn it.
    shapes = {
        "input_args": ids[:rows] if place.rank == 0 else hidden,
        "output_args": hidden if place.rank == 0 else torch.zeros(rows, SEQLEN, VOCAB),
    }
    stage = PipelineStage(submodule, place.rank, place.size, torch.device("cpu"), **shapes)

    def loss_of(logits: Tensor, target: Tensor) -> Tensor:
        logits, target = logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()
        return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / items

    run = _SCHEDULES[schedule](stage, n_microbatches=2, loss_fn=loss_of, scale_grads=False)
    losses: list[Tensor] = []
    given = (ids,) if place.rank == 0 else ()
    target = {"target": labels, "losses": losses} if place.rank == place.size - 1 else {}
    run.step(*given, attention_mask=real.long(), **target)
    if handle is not None:
        report = handle.report()
        assert (report.forwards, report.stock) == (2, {}), report
        assert len(report.layers) == 1, report
    gradients = {names[id(w)]: w.grad for w in submodule.parameters() if w.grad is not None}
    return gradients, [loss.detach() for loss in losses]
