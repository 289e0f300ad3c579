"""A flat call shared out over the ranks of a sequence group, and its outputs put together again."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from padless.backends.request import AttentionRequest
from padless.environment import autocast_dtype, autocasts
from padless.errors import UnsupportedError
from padless.hf.call import modeling_llama
from padless.kernels.unpad import IGNORED
from padless.layout import VarlenLayout
from padless.parallel.choice import choose_algorithm
from padless.parallel.exchange import add_up
from padless.parallel.group import SequenceGroup
from padless.parallel.ring_plan import serves_ring
from padless.parallel.shard import ALGORITHMS, Shard
from padless.parallel.split import split_balanced
from padless.parallel.ulysses import reject_heads
from padless.unpadded.batch import FlatBatch

_logger = logging.getLogger("padless")
_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")


@dataclass(eq=False)
class SequenceParallel:
    """How a patch shares out sequences.

    Attributes:
        group: the ranks.
        algorithm: "auto", "ulysses" or "ring", as asked.
    """

    group: SequenceGroup
    algorithm: str
    _checked: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    _rings: dict[Any, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: Any, algorithm: str) -> SequenceParallel | None:
        """Reads what was asked of a patch; None without a mesh.

        Raises:
            TypeError: mesh is not a DeviceMesh.
            ValueError: the mesh has another number of dimensions, or no algorithm has this name.
            RuntimeError: torch.distributed is not initialised.
            UnsupportedError: the installed transformers cannot share out a loss.
        """
        if algorithm not in ("auto", *ALGORITHMS):
            raise ValueError(
                f"sequence_parallel must be 'auto' or one of {', '.join(ALGORITHMS)}, "
                f"got {algorithm!r}"
            )
        if mesh is None:
            return None
        group = SequenceGroup.of(mesh)
        _refuse_loss()
        return cls(group, algorithm)

    def refuse(self, model: nn.Module) -> None:
        """Refuses a model with a `LlamaModel` that cannot be shared out, or not as asked.

        Raises:
            UnsupportedError: there is one.
        """
        for module in model.modules():
            if isinstance(module, modeling_llama().LlamaModel):
                self._refuse_one(module)

    def _refuse_one(self, model: Any) -> None:
        _refuse_rope(model)
        if self.algorithm == "ulysses":
            reason = reject_heads(int(model.config.num_attention_heads), self.group.size)
            if reason:
                raise UnsupportedError(reason)

    def check(self, model: Any, arguments: dict[str, Any], layout: VarlenLayout) -> None:
        """Checks a `LlamaModel` and its first batch, which is compared between the ranks.

        Raises:
            UnsupportedError: the model cannot be shared out, or not as asked.
            ValueError: the batch is not the same on all.
        """
        if model not in self._checked:
            self._refuse_one(model)
            _check_same(arguments, layout, self.group)
            self._checked.add(model)

    def shard(self, layout: VarlenLayout, model: Any, dtype: torch.dtype, backend: str) -> Shard:
        """Shares out a row, with "auto" by the algorithm whose ranks send less.

        Args:
            layout: of the whole row.
            model: the `LlamaModel`.
            dtype: that attention computes in.
            backend: of `varlen_attention`, or "auto".
        """
        if self.algorithm != "auto":
            return Shard.of(layout, self.group, self.algorithm)
        config = model.config
        num_heads = int(config.num_attention_heads)
        num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
        split = split_balanced(layout.lengths, self.group.size)
        chosen = choose_algorithm(split, num_heads, num_kv_heads)
        if chosen == "ring" and not reject_heads(num_heads, self.group.size):
            head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
            device = layout.cu_seqlens.device
            request = AttentionRequest(
                device,
                dtype,
                head_dim,
                num_heads,
                num_kv_heads,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                # Whether there will be gradients or not: a ring of the one serves the other.
                needs_grad=True,
            )
            if not self._serves_ring(request, backend, max(split.totals)):
                chosen = "ulysses"
        return Shard.of(layout, self.group, chosen, split if chosen == "ring" else None)

    def _serves_ring(self, request: AttentionRequest, backend: str, tokens: int) -> bool:
        """Asks once for each kind of call, on every rank: they must not go different ways."""
        key = replace(request, device=torch.device(request.device.type)), backend
        if key not in self._rings:
            served = serves_ring(request, backend, tokens)
            self._rings[key] = self.group.agrees(served, request.device)
        return self._rings[key]

    def __str__(self) -> str:
        return f"{self.algorithm} over {self.group.size} ranks"


def _refuse_rope(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = str(getattr(module, "rope_type", ""))
        if "dynamic" in kind or kind == "longrope":
            raise UnsupportedError(
                f"sequence_mesh needs a rope that depends on no other token's position, and that "
                f"of {name} is {kind!r}; leave sequence_mesh out"
            )


def _refuse_loss() -> None:
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        known: set[str] = set()
    else:
        known = set(inspect.signature(ForCausalLMLoss).parameters)
    if not {"shift_labels", "num_items_in_batch"} <= known:
        from transformers import __version__

        raise UnsupportedError(
            f"sequence_mesh needs a loss that takes shift_labels, which transformers has from 4.50 "
            f"on, got {__version__}; upgrade transformers, or leave sequence_mesh out"
        )


def whole_reason(arguments: dict[str, Any]) -> str | None:
    """Says why every rank has to compute the whole of a call; None if it may be shared out."""
    if arguments.get("use_cache") and arguments.get("past_key_values") is None:
        return "use_cache=True"
    if arguments.get("past_key_values") is not None:
        return "a cache"
    return None


def shard_call(
    arguments: dict[str, Any], batch: FlatBatch, sequence: SequenceParallel, model: Any
) -> Shard:
    """Keeps this rank's part of a flat call, in place.

    Labels are shifted before the row is cut: the label of a rank's last token may be with another
    rank. The mean that the loss takes is over the labels of all ranks.

    Args:
        arguments: by name, of the flat call: `(1, total, ...)` each.
        batch: the call's, whose layout is of the whole row.
        sequence: who shares it.
        model: the `LlamaModel`.

    Returns:
        The shard.

    Raises:
        ValueError: the ranks were given different batches; asked once a model.
        UnsupportedError: the model cannot be shared out.
    """
    layout = batch.layout
    sequence.check(model, arguments, layout)
    _shift_labels(arguments)
    # Each rank has a token at least, since not every kernel takes none: blank documents behind all.
    blanks = max(0, sequence.group.size - layout.total)
    if blanks:
        layout = VarlenLayout.from_lengths(
            [*layout.lengths, *[1] * blanks], device=layout.cu_seqlens.device
        )
    shard = sequence.shard(layout, model, _dtype(model, arguments), batch.backend)
    for name in _PER_TOKEN:
        if arguments.get(name) is not None:
            row = arguments[name][0]
            if blanks:
                fill = IGNORED if name in ("labels", "shift_labels") else 0
                row = torch.cat([row, row.new_full((blanks, *row.shape[1:]), fill)])
            arguments[name] = shard.take(row).unsqueeze(0)
    # What a layer would keep is a part of the keys only.
    arguments["use_cache"] = False
    return shard


def _dtype(model: Any, arguments: dict[str, Any]) -> torch.dtype:
    """Tells what attention will compute in, as far as can be told in front of the model."""
    embeds = arguments.get("inputs_embeds")
    x = next(model.parameters()) if embeds is None else embeds
    return autocast_dtype(x) if autocasts(x) else x.dtype


def _shift_labels(arguments: dict[str, Any]) -> None:
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if shifted is None and labels is not None:
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    if shifted is None:
        return
    arguments["shift_labels"] = shifted
    if labels is not None:
        # Read for whether there are any; what counts is shift_labels.
        arguments["labels"] = shifted
    if arguments.get("num_items_in_batch") is None:
        arguments["num_items_in_batch"] = (shifted != IGNORED).sum()


def _check_same(arguments: dict[str, Any], layout: VarlenLayout, group: SequenceGroup) -> None:
    ids = arguments.get("input_ids")
    # hash() of integers is the same in every process.
    facts = [layout.total, len(layout.lengths), hash(layout.lengths)]
    own = torch.tensor(facts, device=layout.cu_seqlens.device)
    told = torch.zeros_like(own[:1])
    if ids is not None:
        told = (ids[0] * torch.arange(1, ids.shape[1] + 1, device=ids.device)).sum()[None]
    own = torch.cat([own, told.to(own)])
    found = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(found, own, group=group.process_group)
    if any(not torch.equal(each, own) for each in found):
        raise ValueError(
            f"every rank of sequence_mesh must be given the same batch, got batches of "
            f"{[int(each[0]) for each in found]} real tokens that differ; seed samplers by the "
            f"data-parallel rank, not by the global one"
        )


def gather_loss(outputs: Any, shard: Shard) -> None:
    """Replaces this rank's part of a loss by the sum of all parts, in place."""
    loss = outputs.get("loss")
    if loss is not None:
        outputs["loss"] = add_up(loss, shard.group)


def gathered(shard: Shard, layout: VarlenLayout) -> Callable[[Tensor], Tensor]:
    """Makes what collects an output of this rank's tokens: `(1, own, ...)` to `(1, total, ...)`."""

    def gather(local: Tensor) -> Tensor:
        return shard.gather(local[0])[: layout.total].unsqueeze(0)

    return gather
