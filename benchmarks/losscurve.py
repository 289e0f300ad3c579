"""The loss of a real model under transformers' Trainer, patched by one line and as it is.

Two runs that round differently drift apart, each as good as the other. So the unpatched run also
asks a patched twin on its very weights at every step: those differences do not add up, and their
mean has to be zero.
"""

from __future__ import annotations

import importlib.resources
import logging
import random
import statistics
import tempfile
from typing import Any

import torch

import padless
from benchmarks import names
from benchmarks.record import Record, parser
from padless.benchmark.models import SMOKE, build_llama, sharing_copy
from padless.benchmark.variant import Timing

STEPS = 50
_ROWS = 4
_LONGEST = 128
# Of the model's thirty: what two cores train in minutes.
_LAYERS = 4
_logger = logging.getLogger("benchmarks")

Sample = dict[str, list[int]]


def main() -> None:
    """Trains twice in each precision and writes the record."""
    options = parser(__doc__, seconds=0)
    options.add_argument("--steps", type=int, default=STEPS)
    arguments = options.parse_args()
    record = Record("losscurve", arguments)
    steps = 4 if record.smoke else arguments.steps
    if record.smoke:
        longest, folder, tokenizer = 32, None, None
    else:
        longest, folder, tokenizer = _LONGEST, *_demo()
    samples = _samples(tokenizer, steps * _ROWS, longest, arguments.seed)
    for precision in ("float32", "bfloat16 autocast"):
        curves = [
            _train(name, folder, samples, precision, steps, arguments)
            for name in (names.SDPA, names.PADLESS)
        ]
        record.add(
            precision,
            curves,
            steps=steps,
            rows_a_step=_ROWS,
            longest=longest,
            tokens_real=sum(len(sample["input_ids"]) for sample in samples),
            model="small random LLaMA" if folder is None else f"SmolLM2-135M, {_LAYERS} layers",
            difference=_compare(*curves),
        )


def _compare(stock: Timing, patched: Timing) -> dict[str, dict[str, float]] | None:
    """Compares the losses of the two runs, and those of the twins on the same weights."""
    if stock.reason or patched.reason:
        return None
    losses = stock.facts["losses"]
    return {
        "runs": _relative(losses, patched.facts["losses"]),
        "same_weights": _relative(losses, stock.facts["patched_on_same_weights"]),
    }


def _relative(losses: list[float], others: list[float]) -> dict[str, float]:
    """Makes the largest relative difference, the mean one and its standard error."""
    relative = [(b - a) / a for a, b in zip(losses, others, strict=True)]
    return {
        "largest": max(map(abs, relative)),
        "mean": statistics.fmean(relative),
        "standard_error": statistics.stdev(relative) / len(relative) ** 0.5,
    }


def _demo() -> tuple[Any, Any]:
    from padless.checkpoint import load_tokenizer
    from padless.demo import prepare_demo_model

    folder = prepare_demo_model()
    return folder, load_tokenizer(folder)


def _model(folder: Any, seed: int) -> Any:
    if folder is None:
        torch.manual_seed(seed)
        return build_llama(SMOKE, dtype=torch.float32, device="cpu", longest=_LONGEST)
    from transformers import AutoModelForCausalLM

    # The first layers of the real model, with its embedding, norm and head.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, num_hidden_layers=_LAYERS
    )


def _samples(tokenizer: Any, count: int, longest: int, seed: int) -> list[Sample]:
    """Cuts stretches of random lengths out of texts."""
    rng = random.Random(seed)
    text = importlib.resources.files("padless").joinpath("data/texts.txt").read_text("utf-8")
    if tokenizer is None:
        tokens = [1 + ord(letter) % (SMOKE.vocab_size - 1) for letter in text]
    else:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = []
    for _ in range(count):
        length = rng.randint(longest // 8, longest)
        start = rng.randrange(len(tokens) - length)
        made.append({"input_ids": tokens[start : start + length]})
    return made


def _collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pads on the right, as a collator of transformers does."""
    width = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length] = torch.tensor(sample["input_ids"])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _train(
    name: str, folder: Any, samples: list[Sample], precision: str, steps: int, arguments: Any
) -> Timing:
    try:
        return _trained(name, folder, samples, precision, steps, arguments)
    except Exception as error:
        return Timing(name, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:240])


def _trained(
    name: str, folder: Any, samples: list[Sample], precision: str, steps: int, arguments: Any
) -> Timing:
    model = _model(folder, arguments.seed)
    is_patched = name == names.PADLESS
    # Before the trainer wraps the model's forward.
    twin = model if is_patched else sharing_copy(model)
    handle = padless.patch(twin)
    on_same_weights: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        options = _options(out, precision, steps, arguments)
        trainer = _trainer(model, options, samples, None if is_patched else twin, on_same_weights)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = handle.report()
    if report.stock or report.forwards != steps:
        raise RuntimeError(f"{report.forwards} of {steps} forwards flat, {report.stock}")
    facts: dict[str, Any] = {"losses": [float(loss) for loss in losses]}
    if is_patched:
        facts["computed_tokens"] = report.computed_tokens
        facts["skipped_tokens"] = report.skipped_tokens
    else:
        facts["patched_on_same_weights"] = on_same_weights
    _logger.info("%s, %s: loss %.4f to %.4f", name, precision, losses[0], losses[-1])
    return Timing(name, facts=facts)


def _options(out: str, precision: str, steps: int, arguments: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=_ROWS,
        learning_rate=1e-4,
        warmup_steps=steps // 5,
        lr_scheduler_type="constant_with_warmup",
        bf16=precision.startswith("bfloat16"),
        use_cpu=arguments.device == "cpu",
        seed=arguments.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _trainer(
    model: Any, options: Any, samples: list[Sample], twin: Any, on_same_weights: list[float]
) -> Any:
    """Makes a trainer which also notes the loss of a twin of the model, if there is one."""
    from transformers import PrinterCallback, Trainer

    class AskingTwin(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if twin is not None:
                # The model's own forward is wrapped so by the trainer.
                autocast = torch.autocast(options.device.type, torch.bfloat16, options.bf16)
                with torch.no_grad(), autocast:
                    loss = super().compute_loss(twin, dict(inputs), *args, **kwargs)
                on_same_weights.append(float(loss))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = AskingTwin(model, options, train_dataset=samples, data_collator=_collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
