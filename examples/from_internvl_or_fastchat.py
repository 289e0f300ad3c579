"""From InternVL's or FastChat's patch to padless: what to write instead, and what it gives.

    python examples/from_internvl_or_fastchat.py --steps 3

Their line stays as it is, with padless in the place of the file: it replaces attention, for every
LLaMA of the process, and attends by SDPA on the padded batch as InternVL's file does on torch 2.
`padless.patch(model)` computes real tokens only, embedding to loss, and touches this model alone.
FastChat's `replace_llama_attn_with_flash_attn` has the same name, and either line in its place.
"""

import time

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import padless
from internvl.patch.llama_flash_attn_monkey_patch import replace_llama_attn_with_flash_attn
from padless.demo import demo_texts, prepare_demo_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# What rounding leaves between kernels; a token too much in the loss is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-4


def measure(model, batch, steps):
    """Returns the loss and the median milliseconds of a step, behind one to warm up."""
    times = []
    for _ in range(steps + 1):
        model.zero_grad()
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return loss.item(), sorted(times[1:])[steps // 2]


def main(steps: int = 3):
    """Measure a step unpatched, by the original's line, and by padless's own."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).train()
    # InternVL pads on the right to train; either side is right here.
    collate = padless.PaddingCollator(tokenizer.pad_token_id, padding_side="left")
    batch = collate([{"input_ids": tokenizer(text)["input_ids"]} for text in demo_texts()[:4]])
    batch = {name: value.to(DEVICE) for name, value in batch.items()}

    found = {"unpatched": measure(model, batch, steps)}

    # Before: the import path and the name of InternVL. It returns a handle now.
    with replace_llama_attn_with_flash_attn() as before:
        found["replace_llama_attn_with_flash_attn()"] = measure(model, batch, steps)
        print(before.report())

    # After: this model only, and all of it.
    with padless.patch(model) as after:
        found["padless.patch(model)"] = measure(model, batch, steps)
        print(after.report())

    real = int(batch["attention_mask"].sum())
    table = Table("step", "ms", "real tokens/s", "loss")
    for name, (loss, ms) in found.items():
        table.add_row(name, f"{ms:.0f}", f"{real / ms * 1000:.0f}", f"{loss:.5f}")
    Console().print(table)
    losses = [loss for loss, _ in found.values()]
    if max(losses) - min(losses) > TOLERANCE:
        raise SystemExit(f"losses differ by {max(losses) - min(losses):.1e}")
    print("the loss is that of the unpatched model")


if __name__ == "__main__":
    typer.run(main)
