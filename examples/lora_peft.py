"""LoRA with PEFT: adapters on a patched model, before or after they are put on.

    python examples/lora_peft.py --steps 6

The projections stay modules, so adapters on them work as ever. Trains SmolLM2-135M's adapters twice
from the same start, unpatched and patched, in a plain loop.
"""

import time

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import padless
from padless.demo import demo_texts, prepare_demo_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# What rounding leaves between two trainings; a token too much in the loss is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-3


def train(batches, folder, *, is_patched):
    """Trains adapters and returns the losses, milliseconds a step, and the patch's report."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    lora = LoraConfig(
        r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora).train()
    handle = padless.patch(model) if is_patched else None  # the one line
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    start = time.perf_counter()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    step_ms = (time.perf_counter() - start) / len(batches) * 1000
    return losses, step_ms, handle and handle.report()


def main(steps: int = 6):
    """Train adapters unpatched and patched, and compare."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in demo_texts()]
    collate = padless.PaddingCollator(pad_token_id=tokenizer.pad_token_id)
    at = range(0, len(examples), 4)
    batches = [collate(examples[at[n % len(at)] :][:4]) for n in range(steps)]
    batches = [{name: value.to(DEVICE) for name, value in batch.items()} for batch in batches]

    stock, stock_ms, _ = train(batches, folder, is_patched=False)
    patched, patched_ms, report = train(batches, folder, is_patched=True)

    real = sum(int(batch["attention_mask"].sum()) for batch in batches) / steps
    table = Table("LoRA", "ms a step", "real tokens/s", "loss, first step", "loss, last step")
    for name, losses, ms in (("unpatched", stock, stock_ms), ("padless", patched, patched_ms)):
        speed = f"{real / ms * 1000:.0f}"
        table.add_row(name, f"{ms:.0f}", speed, f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    Console().print(table)
    print(report)
    gap = max(abs(a - b) for a, b in zip(stock, patched, strict=True))
    if gap > TOLERANCE:
        raise SystemExit(f"losses differ by {gap:.1e}")
    print(f"the losses are those of the unpatched model (largest difference {gap:.1e})")


if __name__ == "__main__":
    typer.run(main)
