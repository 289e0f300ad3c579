"""Faults planted on every rank of a pool for the length of one job."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from padless.kernels.unpad import IGNORED


def under(fault: str, job: str, *arguments: Any) -> Any:
    """Runs `module:function(*arguments)` with a fault in place."""
    module, _, function = job.partition(":")
    with FAULTS[fault]():
        return getattr(importlib.import_module(module), function)(*arguments)


def _after_sharding(change: Callable[[dict[str, Any]], None]) -> Any:
    from padless.unpadded import call, sharding

    def shard_call(arguments: dict[str, Any], *rest: Any) -> Any:
        shard = sharding.shard_call(arguments, *rest)
        change(arguments)
        return shard

    return mock.patch.object(call, "shard_call", shard_call)


def _wrong_position() -> Any:
    def change(arguments: dict[str, Any]) -> None:
        positions = arguments["position_ids"].clone()
        positions[:, 0] += 1
        arguments["position_ids"] = positions

    return _after_sharding(change)


def _positions_from_zero() -> Any:
    def change(arguments: dict[str, Any]) -> None:
        arguments["position_ids"] = torch.arange(arguments["position_ids"].shape[1])[None]

    return _after_sharding(change)


def _label_dropped() -> Any:
    def change(arguments: dict[str, Any]) -> None:
        shifted = arguments["shift_labels"].clone()
        shifted[:, -1] = IGNORED
        arguments["shift_labels"] = shifted

    return _after_sharding(change)


def _labels_shifted_behind_the_cut() -> Any:
    from padless.unpadded import sharding

    def keep(arguments: dict[str, Any]) -> None:
        labels = arguments["labels"]
        arguments["num_items_in_batch"] = (labels[:, 1:] != IGNORED).sum()

    return mock.patch.object(sharding, "_shift_labels", keep)


def _local_mean() -> Any:
    def change(arguments: dict[str, Any]) -> None:
        arguments["num_items_in_batch"] = None

    return _after_sharding(change)


def _not_causal_between_ranks() -> Any:
    from padless.parallel import blocks, ring_plan

    def visible_blocks(*arguments: Any, causal: bool) -> Any:
        return blocks.visible_blocks(*arguments, causal=False)

    return mock.patch.object(ring_plan, "visible_blocks", visible_blocks)


def _merge_without_max() -> Any:
    from padless.kernels import merge as merge_module

    def merge(out: Any, lse: Any, part: Any, part_lse: Any) -> Any:
        total = lse.exp() + part_lse.exp()
        weights = ((x.exp() / total).T.unsqueeze(-1) for x in (lse, part_lse))
        return out * next(weights) + part * next(weights), total.log()

    return mock.patch.object(merge_module, "merge", merge)


def _one_document() -> Any:
    from padless import VarlenLayout
    from padless.parallel.shard import Shard

    of = Shard.of.__func__

    def forgetful(cls: Any, layout: Any, *rest: Any) -> Any:
        return of(cls, VarlenLayout.from_lengths([layout.total]), *rest)

    return mock.patch.object(Shard, "of", classmethod(forgetful))


@contextlib.contextmanager
def _gradient_of_own_part() -> Iterator[None]:
    from padless.parallel import exchange

    with mock.patch.object(exchange._Sum, "backward", staticmethod(lambda ctx, grad: (grad, None))):
        yield


def _kv_heads_swapped() -> Any:
    from padless.parallel import shard, ulysses

    def attend_by_heads(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        return ulysses.attend_by_heads(q, k.flip(1), v.flip(1), *rest, **options)

    return mock.patch.object(shard, "attend_by_heads", attend_by_heads)


def _no_ring_on_the_last_rank() -> Any:
    import torch.distributed as dist

    from padless.unpadded import sharding

    def serves_ring(*arguments: Any) -> bool:
        return dist.get_rank() < dist.get_world_size() - 1

    return mock.patch.object(sharding, "serves_ring", serves_ring)


FAULTS: dict[str, Callable[[], Any]] = {
    "a position at a border": _wrong_position,
    "positions from zero": _positions_from_zero,
    "a label at a border dropped": _label_dropped,
    "labels shifted behind the cut": _labels_shifted_behind_the_cut,
    "a mean of each rank": _local_mean,
    "no causal mask between ranks": _not_causal_between_ranks,
    "a merge without the maximum": _merge_without_max,
    "documents joined": _one_document,
    "the gradient of a rank's own part": _gradient_of_own_part,
    "KV heads swapped": _kv_heads_swapped,
    "no ring on the last rank": _no_ring_on_the_last_rank,
    "none": contextlib.nullcontext,
}
