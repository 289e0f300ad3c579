"""A plain PyTorch loop with Accelerate: accumulation, clipping, and packed rows.

    python examples/accelerate_loop.py --steps 4

Trains SmolLM2-135M three times from the same start: unpatched and patched on padded batches, and
patched on the same examples packed into one row, in which none sees another. All three have the
same losses.
"""

import time

import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import padless
from padless.demo import demo_texts, prepare_demo_model

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# What rounding leaves between two trainings; a token too much in the loss is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-3


def train(folder, examples, collate, steps, *, is_patched):
    """Trains and returns the loss of each micro-batch, milliseconds a step, and a report."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loader = DataLoader(examples, batch_size=2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The one line. Behind `prepare`, so that its mixed precision, if you ask for it, converts the
    # logits of real tokens only.
    handle = padless.patch(model) if is_patched else None
    losses = []
    start = time.perf_counter()
    while len(losses) < 2 * steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == 2 * steps:
                break
    return losses, (time.perf_counter() - start) / steps * 1000, handle and handle.report()


def main(steps: int = 4):
    """Train unpatched, patched, and packed, and compare."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in demo_texts()]
    pad = padless.PaddingCollator(pad_token_id=tokenizer.pad_token_id)
    pack = padless.PackingCollator()

    stock, stock_ms, _ = train(folder, examples, pad, steps, is_patched=False)
    padded, padded_ms, report = train(folder, examples, pad, steps, is_patched=True)
    packed, packed_ms, _ = train(folder, examples, pack, steps, is_patched=True)

    table = Table("Accelerate", "ms a step", "loss, first batch", "loss, last batch")
    rows = [("unpatched, padded", stock, stock_ms), ("padless, padded", padded, padded_ms)]
    for name, losses, step_ms in (*rows, ("padless, packed", packed, packed_ms)):
        table.add_row(name, f"{step_ms:.0f}", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    Console().print(table)
    print(report)
    gap = max(abs(a - b) for run in (padded, packed) for a, b in zip(stock, run, strict=True))
    if gap > TOLERANCE:
        raise SystemExit(f"losses differ by {gap:.1e}")
    print(f"the losses are those of the unpatched model (largest difference {gap:.1e})")


if __name__ == "__main__":
    typer.run(main)
