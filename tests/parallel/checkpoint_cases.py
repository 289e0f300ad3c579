"""Saves a patched model that was trained for a step under an engine, as users of it do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

import padless
from golden.models import build_model
from parallel.engine_cases import global_batch
from parallel.engines import ENGINES
from parallel.group import Place


def save(place: Place, way: str, folder: str) -> dict[str, Tensor]:
    """Trains for a step and saves.

    Args:
        place: of this process.
        way: a key of `WAYS`.
        folder: where to.

    Returns:
        The weights, whole.
    """
    engine, save_model = WAYS[way]
    wrap, _ = ENGINES[engine]
    model = wrap(build_model().train(), place)
    # The same batch for all ranks, whether they share its sequences or not.
    padless.patch(model, sequence_mesh=place.mesh if way.startswith("sequences") else None)
    ids, real, labels = global_batch(1, "uneven")
    model(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    save_model(model, Path(folder), place.rank == 0)
    dist.barrier()
    if isinstance(model, FullyShardedDataParallel):
        return _fsdp1_weights(model, rank0_only=False)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name.removeprefix("module."): weight.clone() for name, weight in whole.items()}


def _fsdp1_weights(model: Any, *, rank0_only: bool) -> dict[str, Tensor]:
    config = FullStateDictConfig(rank0_only=rank0_only)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
        return dict(model.state_dict())


def _save_pretrained(model: Any, folder: Path, is_first: bool) -> None:
    if is_first:
        model.module.save_pretrained(folder)


def _save_pickled(model: Any, folder: Path, is_first: bool) -> None:
    if is_first:
        folder.mkdir()
        torch.save(model.module, folder / "model.pt")


def _save_whole_fsdp2(model: Any, folder: Path, is_first: bool) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if is_first:
        model.save_pretrained(folder, state_dict=weights)


def _save_whole_fsdp1(model: Any, folder: Path, is_first: bool) -> None:
    weights = _fsdp1_weights(model, rank0_only=True)
    if is_first:
        model.module.save_pretrained(folder, state_dict=weights)


def _save_sharded(model: Any, folder: Path, is_first: bool) -> None:
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def _save_from_all(model: Any, folder: Path, is_first: bool) -> None:
    model.save_pretrained(folder, is_main_process=is_first)


WAYS: dict[str, tuple[str, Callable[[Any, Path, bool], None]]] = {
    "ddp, save_pretrained": ("ddp", _save_pretrained),
    "ddp, torch.save": ("ddp", _save_pickled),
    "sequences over ranks, save_pretrained": ("ddp", _save_pretrained),
    "sequences over ranks, torch.save": ("ddp", _save_pickled),
    "sequences over ranks, distributed checkpoint": ("fsdp2", _save_sharded),
    "fsdp2, save_pretrained": ("fsdp2", _save_whole_fsdp2),
    "fsdp2, distributed checkpoint": ("fsdp2", _save_sharded),
    "fsdp1, save_pretrained": ("fsdp1", _save_whole_fsdp1),
    "tensor parallel, save_pretrained": ("tensor parallel, transformers", _save_from_all),
}
