"""`TokensCallback` against what went into the model: training alone, on a clock of its own."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import padless
from padless.training import tokens_callback

LAYERS = 2
LENGTHS = [3, 9, 5, 12, 7, 4, 10, 6]
EVALUATION_S, SAVING_S, LOADING_S, STEP_S = 1000.0, 500.0, 0.25, 1.0


class Seen:
    """Counts what enters the model, and is the clock: a training forward takes a second."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.now = 0.0
        self.real: list[int] = []
        self.slots: list[int] = []
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.now += STEP_S if model.training else EVALUATION_S
        if model.training:
            self.real.append(int(kwargs["attention_mask"].sum()))
            self.slots.append(kwargs["attention_mask"].numel())


class SlowTrainer(Trainer):
    """Saving takes its time too."""

    seen: Seen

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.seen.now += SAVING_S
        super().save_model(*args, **kwargs)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def seen(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen(model)
    clock = types.SimpleNamespace(perf_counter=lambda: seen.now)
    monkeypatch.setattr(tokens_callback, "time", clock)
    return seen


@pytest.fixture
def handle(model: LlamaForCausalLM) -> Iterator[padless.PatchHandle]:
    with padless.patch(model) as handle:
        yield handle


Make = Callable[..., Trainer]


@pytest.fixture
def make(model: LlamaForCausalLM, seen: Seen, tmp_path: Path) -> Make:
    """Makes a Trainer with the callback; options are those of TrainingArguments."""
    examples = [{"input_ids": list(range(3, 3 + n))} for n in LENGTHS]
    pad = padless.PaddingCollator(pad_token_id=0)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.now += LOADING_S
        return pad(batch)

    def make(**options: Any) -> Trainer:
        name = "eval_strategy"
        if name not in inspect.signature(TrainingArguments).parameters:
            name = "evaluation_strategy"
        if "eval_strategy" in options:
            options[name] = options.pop("eval_strategy")
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 4,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **options,
        }
        trainer = SlowTrainer(
            model=model,
            args=TrainingArguments(**options),
            train_dataset=examples,
            eval_dataset=examples,
            data_collator=collate,
        )
        trainer.seen = seen
        trainer.add_callback(padless.TokensCallback(trainer))
        return trainer

    return make


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def assert_counts(record: dict[str, Any], seen: Seen, part: slice, seconds: float) -> None:
    real, slots = sum(seen.real[part]), sum(seen.slots[part])
    assert record["padding_skipped"] == pytest.approx(1 - real / slots)
    assert record["real_tokens_per_second"] == pytest.approx(real / seconds)
    assert record["attention_sdpa"] == 1.0
    assert record["stock_forwards"] == 0


@pytest.mark.usefixtures("handle")
def test_each_record_is_of_the_steps_since_the_one_before(make: Make, seen: Seen) -> None:
    trainer = make()
    trainer.train()
    first, second = records(trainer)
    assert sum(seen.real) == sum(LENGTHS)
    assert_counts(first, seen, slice(0, 2), _seconds(first, seen, slice(0, 2)))
    assert_counts(second, seen, slice(2, 4), _seconds(second, seen, slice(2, 4)))
    # The end of training logs what Trainer makes of it, and nothing of ours.
    assert not any("padding_skipped" in r for r in trainer.state.log_history if "loss" not in r)


def _seconds(record: dict[str, Any], seen: Seen, part: slice) -> float:
    """Seconds of the forwards, and the loading that fell in: Trainer loads batches ahead."""
    seconds = sum(seen.real[part]) / record["real_tokens_per_second"]
    forwards = len(seen.real[part]) * STEP_S
    loads = (seconds - forwards) / LOADING_S
    assert loads == pytest.approx(round(loads))
    assert 0 <= round(loads) <= len(seen.real[part]) + 1
    return seconds


@pytest.mark.usefixtures("handle")
def test_accumulated_batches_all_count(make: Make, seen: Seen) -> None:
    trainer = make(gradient_accumulation_steps=2, max_steps=2, logging_steps=1)
    trainer.train()
    for number, record in enumerate(records(trainer)):
        part = slice(2 * number, 2 * number + 2)
        assert_counts(record, seen, part, _seconds(record, seen, part))


@pytest.mark.usefixtures("handle")
def test_evaluation_and_saving_in_between_do_not_count(make: Make, seen: Seen) -> None:
    # Evaluation after each step, so also between two steps of one record.
    trainer = make(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert seen.now > 4 * EVALUATION_S + 4 * SAVING_S
    for number, record in enumerate(records(trainer)):
        part = slice(2 * number, 2 * number + 2)
        assert_counts(record, seen, part, _seconds(record, seen, part))
    evaluations = [r for r in trainer.state.log_history if "eval_loss" in r]
    assert len(evaluations) == 4
    assert not any("real_tokens_per_second" in record for record in evaluations)


@pytest.mark.usefixtures("handle")
def test_a_resumed_run_counts_from_there_on(make: Make, seen: Seen) -> None:
    make(save_strategy="steps", save_steps=2, max_steps=2).train()
    before = len(seen.real)
    trainer = make(save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    old, new = records(trainer)
    assert len(seen.real) - before == 2
    # The record of the first run is in the checkpoint as it was logged.
    assert_counts(old, seen, slice(0, 2), _seconds(old, seen, slice(0, 2)))
    part = slice(before, None)
    assert_counts(new, seen, part, _seconds(new, seen, part))


@pytest.mark.usefixtures("handle")
def test_a_second_run_of_one_trainer_begins_anew(make: Make, seen: Seen) -> None:
    trainer = make(logging_steps=4)
    trainer.train()
    trainer.evaluate()
    before = len(seen.real)
    trainer.train()
    (record,) = records(trainer)
    part = slice(before, None)
    assert_counts(record, seen, part, _seconds(record, seen, part))


def test_what_is_left_to_the_stock_path_shows(
    make: Make, seen: Seen, handle: padless.PatchHandle, model: LlamaForCausalLM
) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    trainer = make()
    trainer.train()
    for record in records(trainer):
        assert record["stock_forwards"] == 2
        assert record["real_tokens_per_second"] == 0.0
        assert "padding_skipped" not in record and "attention_sdpa" not in record
    assert sum(handle.report().stock.values()) == 4


def test_a_patch_of_the_process_is_found(make: Make, seen: Seen) -> None:
    handle = padless.patch_llama()
    try:
        trainer = make(logging_steps=4)
        trainer.train()
    finally:
        handle.undo()
    (record,) = records(trainer)
    assert_counts(record, seen, slice(None), _seconds(record, seen, slice(None)))


@pytest.mark.requires("tensorboard")
@pytest.mark.usefixtures("handle")
def test_tensorboard_holds_the_scalars(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options: dict[str, Any] = {"report_to": ["tensorboard"]}
    if "logging_dir" in inspect.signature(TrainingArguments).parameters:
        options["logging_dir"] = str(tmp_path / "board")
    trainer = make(**options)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("real_tokens_per_second", "padding_skipped", "attention_sdpa", "stock_forwards"):
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        want = [record[name] for record in records(trainer)]
        assert [scalar.value for scalar in scalars] == pytest.approx(want)


def test_standard_output_gets_them_too(
    make: Make, handle: padless.PatchHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    make().train()
    assert capsys.readouterr().out.count("'padding_skipped'") == 2


def test_a_model_without_a_patch_is_refused(make: Make) -> None:
    message = (
        r"model must be patched for TokensCallback .* got a LlamaForCausalLM that is not; call "
        r"padless\.patch\(model\) before trainer\.train\(\)"
    )
    with pytest.raises(padless.EngagementError, match=message):
        make().train()


def test_an_undone_patch_is_refused(make: Make, handle: padless.PatchHandle) -> None:
    handle.undo()
    with pytest.raises(padless.EngagementError, match="model must be patched"):
        make().train()


def test_something_that_is_no_trainer_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(TypeError, match="trainer must be a transformers Trainer, got LlamaForCaus"):
        padless.TokensCallback(model)


def test_every_event_of_transformers_is_answered() -> None:
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    assert len(events) > 10
    assert all(callable(getattr(padless.TokensCallback, name)) for name in events)
