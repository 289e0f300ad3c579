"""Evaluation and prediction inside of `Trainer`: what is read of the outputs is the unpatched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import padless
from golden.models import VOCAB, build_model

IGNORED = -100


def _examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (5, 9, 13, 3, 7, 11, 2)]
    return [{"input_ids": ids.tolist()} for ids in drawn]


class _Generates(TrainerCallback):
    """Generates while it evaluates, as people look at samples."""

    def __init__(self) -> None:
        self.texts: list[torch.Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
        model = kwargs["model"]
        assert not model.training
        made = model.generate(
            input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=8, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        self.texts.append(made)


def _run(patched: bool, folder: Path) -> dict[str, Any]:
    model: LlamaForCausalLM = build_model().train()
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        guessed = prediction.predictions[:, :-1].argmax(-1)
        wanted = prediction.label_ids[:, 1:]
        at = wanted != IGNORED
        return {"hits": float((guessed == wanted)[at].sum()), "tokens": float(at.sum())}

    samples = _Generates()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=3,
            eval_strategy="steps", eval_steps=2, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, learning_rate=1e-3, gradient_accumulation_steps=2,
        ),
        train_dataset=_examples() * 3,
        eval_dataset=_examples(),
        data_collator=padless.PaddingCollator(pad_token_id=0),
        compute_metrics=metrics,
        callbacks=[samples],
    )  # fmt: skip
    handle = padless.patch(model) if patched else None
    trainer.train()
    predicted = trainer.predict(_examples())
    log = [
        value
        for record in trainer.state.log_history
        for name, value in sorted(record.items())
        if name in ("loss", "grad_norm", "eval_loss", "eval_hits", "eval_tokens")
    ]
    if handle is not None:
        report = handle.report()
        assert report.skipped_tokens > 0
        # Behind the prompts of its samples nothing but their steps.
        assert report.stock == {} and report.generations == len(samples.texts) == 2
    return {"log": log, "predicted": predicted, "seen": seen, "texts": samples.texts}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_losses_metrics_and_predictions_are_the_unpatched_ones(tmp_path: Path) -> None:
    want, got = (_run(patched, tmp_path / str(patched)) for patched in (False, True))
    assert len(want["log"]) == 4 * 2 + 2 * 3
    np.testing.assert_allclose(got["log"], want["log"], rtol=1e-4)
    assert len(want["seen"]) == 3
    for ours, theirs in zip(got["seen"], want["seen"], strict=True):
        assert ours.shape == theirs.shape == (7, 13, VOCAB)
    real = want["predicted"].label_ids != IGNORED
    assert np.array_equal(got["predicted"].label_ids, want["predicted"].label_ids)
    ours, theirs = (each["predicted"].predictions for each in (got, want))
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(got["texts"], want["texts"], strict=True))
