"""Trainer with the balanced sampler, on every rank, and the same training in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import padless
from golden.models import VOCAB, build_model
from golden.steps import IGNORED
from parallel.group import Place

FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}
SAMPLES, MAX_TOKENS, LEARNING_RATE, EPOCHS = 23, 30, 0.01, 2


def examples() -> list[dict[str, Tensor]]:
    """Draws examples of 2 to 20 tokens; each begins with its own number."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 21, (SAMPLES,), generator=generator).tolist()
    made = [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]
    for number, ids in enumerate(made):
        ids[0] = 3 + number
    return [{"input_ids": ids} for ids in made]


def sampler_of(size: int, rank: Any) -> padless.BalancedBatchSampler:
    """Makes the sampler that all trainings of these tests use."""
    lengths = [len(example["input_ids"]) for example in examples()]
    return padless.BalancedBatchSampler(
        lengths, MAX_TOKENS, num_replicas=size, rank=rank, cost=padless.SequenceCost(1.0, 0.02)
    )


class BalancedTrainer(Trainer):
    """Trainer with the sampler, as docs/several-gpus.md writes it."""

    def get_train_dataloader(self) -> Any:
        sampler = sampler_of(self.args.world_size, "all")
        self.add_callback(SetEpoch(sampler))
        loader = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch, which not every version of Trainer hands on to it."""

    def __init__(self, sampler: padless.BalancedBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


def train(
    place: Place,
    collator: str,
    name: str,
    *,
    accumulate: int = 1,
    resume: int | None = None,
    global_count: bool = True,
    fsdp: bool = False,
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Trains a patched model by `Trainer`.

    Args:
        place: of this process.
        collator: "packing" or "padding".
        name: of the folder of checkpoints.
        accumulate: batches of a step.
        resume: the step whose checkpoint it goes on from.
        global_count: whether the loss is normalised over the labels of all ranks.
        fsdp: whether accelerate shards the weights by FSDP2.

    Returns:
        The weights, and the numbers of the examples in each batch of this rank.
    """
    model = build_model().train()
    handle = padless.patch(model)
    batches: list[list[int]] = []
    collate = padless.PackingCollator() if collator == "packing" else padless.PaddingCollator(0)

    def record(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        batches.append([int(row["input_ids"][0]) - 3 for row in rows])
        return collate(rows)

    folder = place.folder / name
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    sharding: dict[str, Any] = {"save_strategy": "no", "fsdp": True, "fsdp_config": FSDP2}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, num_train_epochs=EPOCHS, learning_rate=LEARNING_RATE,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], seed=0,
        disable_tqdm=True, logging_strategy="no",
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulate,
        remove_unused_columns=False, average_tokens_across_devices=global_count,
        **(sharding if fsdp else saving),
    )  # fmt: skip
    with _fsdp_without_a_gpu(arguments) if fsdp else contextlib.nullcontext():
        trainer = BalancedTrainer(
            model=model, args=arguments, train_dataset=examples(), data_collator=record
        )
        trainer.train(
            resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}")
        )
    assert handle.report().forwards and not handle.report().stock
    weights = {n: w.detach() for n, w in model.named_parameters()}
    assert any(isinstance(w, DTensor) for w in weights.values()) == fsdp
    return {n: _whole(w).clone() for n, w in weights.items()}, batches


@contextlib.contextmanager
def _fsdp_without_a_gpu(arguments: TrainingArguments) -> Iterator[None]:
    """Lets accelerate use FSDP, which it does in a group of GPUs alone; the rest is as there."""
    state = arguments.distributed_state
    AcceleratorState._reset_state()
    before, state.distributed_type = state.distributed_type, DistributedType.MULTI_GPU
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        state.distributed_type = before


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def train_alone(size: int, accumulate: int = 1) -> dict[str, Tensor]:
    """Trains the stock model in one process, each step on the batches of all ranks."""
    model = build_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    sampler = sampler_of(size, "all")
    data, collate = examples(), padless.PaddingCollator(0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        for first in range(0, len(batches), size * accumulate):
            whole = [i for batch in batches[first : first + size * accumulate] for i in batch]
            batch = collate([data[i] for i in whole])
            items = (batch["labels"] != IGNORED).sum()
            model(**batch, num_items_in_batch=items, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {n: w.detach().clone() for n, w in model.named_parameters()}
