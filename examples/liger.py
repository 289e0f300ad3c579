"""Liger and padless together: Liger's loss, norm and MLP, and padless's batch and attention.

    pip install liger-kernel
    python examples/liger.py --steps 3

Either may be applied first. Liger's kernels are written in Triton and need a GPU; on a CPU the same
steps run without them, and the script says so.
"""

import time

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import padless
from padless.demo import demo_texts, prepare_demo_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# What rounding leaves between kernels; a token too much in the loss is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-4


def step(model, batch):
    """Returns the loss and the milliseconds of a training step without its update."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model(**batch).loss
    loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return loss.item(), (time.perf_counter() - start) * 1000


def measure(model, batch, steps):
    """Returns the loss and the median step, behind one to warm up."""
    runs = [step(model, batch) for _ in range(steps + 1)][1:]
    return runs[0][0], sorted(ms for _, ms in runs)[steps // 2]


def main(steps: int = 3):
    """Measure a step unpatched, patched, and with Liger as well."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).train()
    collate = padless.PaddingCollator(pad_token_id=tokenizer.pad_token_id)
    batch = collate([{"input_ids": tokenizer(text)["input_ids"]} for text in demo_texts()[:4]])
    batch = {name: value.to(DEVICE) for name, value in batch.items()}

    found = {"unpatched": measure(model, batch, steps)}
    handle = padless.patch(model)
    found["padless"] = measure(model, batch, steps)
    if DEVICE == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)  # this model only, as padless.patch
        found["padless and Liger"] = measure(model, batch, steps)
    else:
        print("no GPU: Liger's kernels cannot run here; a GPU runs these two lines:")
        print("    padless.patch(model)\n    apply_liger_kernel_to_llama(model=model)")

    real = int(batch["attention_mask"].sum())
    table = Table("step", "ms", "real tokens/s", "loss")
    for name, (loss, ms) in found.items():
        table.add_row(name, f"{ms:.0f}", f"{real / ms * 1000:.0f}", f"{loss:.5f}")
    Console().print(table)
    print(handle.report())
    losses = [loss for loss, _ in found.values()]
    if max(losses) - min(losses) > TOLERANCE:
        raise SystemExit(f"losses differ by {max(losses) - min(losses):.1e}")
    print("the loss is that of the unpatched model")


if __name__ == "__main__":
    typer.run(main)
