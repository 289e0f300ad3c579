"""Evaluation: batched `generate` on left-padded prompts, and the loss of a padded batch.

    python examples/evaluate_generate.py --new-tokens 16

Nothing is passed that transformers does not know: the same calls run unpatched and patched, and
give the same text and the same loss.
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
# What rounding leaves; a token too much in the loss is far above it.
TOLERANCE = 0.02 if DTYPE == torch.bfloat16 else 1e-4


@torch.inference_mode()
def evaluate(model, prompts, texts, new_tokens):
    """Returns new tokens, the loss, and milliseconds of both calls."""
    start = time.perf_counter()
    out = model.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)
    made = out[:, prompts["input_ids"].shape[1] :].tolist()
    generate_ms = (time.perf_counter() - start) * 1000
    start = time.perf_counter()
    loss = model(**texts).loss.item()
    return made, loss, generate_ms, (time.perf_counter() - start) * 1000


def main(new_tokens: int = 16):
    """Evaluate unpatched and patched, and compare."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).eval()
    words = [text.split() for text in demo_texts()[:6]]
    prompts = [" ".join(each[: max(4, len(each) // 2)]) for each in words]
    prompts = tokenizer(prompts, padding=True, return_tensors="pt").to(DEVICE)
    texts = tokenizer(demo_texts()[:6], padding=True, return_tensors="pt").to(DEVICE)
    texts["labels"] = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    # The first token of a row would be predicted from padding.
    first = texts["attention_mask"].argmax(1, keepdim=True)
    texts["labels"].scatter_(1, first, -100)

    evaluate(model, prompts, texts, 2)  # warm up
    stock, stock_loss, *stock_ms = evaluate(model, prompts, texts, new_tokens)
    with padless.patch(model) as handle:  # the one line; undone behind the block
        evaluate(model, prompts, texts, 2)
        patched, patched_loss, *patched_ms = evaluate(model, prompts, texts, new_tokens)
        report = handle.report()

    table = Table("evaluation", "generate, ms", "new tokens/s", "loss, ms", "loss")
    for name, made, loss, ms in (
        ("unpatched", stock, stock_loss, stock_ms),
        ("padless", patched, patched_loss, patched_ms),
    ):
        speed = sum(map(len, made)) / ms[0] * 1000
        table.add_row(name, f"{ms[0]:.0f}", f"{speed:.0f}", f"{ms[1]:.0f}", f"{loss:.5f}")
    Console().print(table)
    print(report)
    print(f"first row: ...{tokenizer.decode(patched[0])!r}")
    same = sum(a == b for a, b in zip(stock, patched, strict=True))
    print(f"{same} of {len(stock)} rows have the same text")
    if abs(stock_loss - patched_loss) > TOLERANCE:
        raise SystemExit(f"losses differ by {abs(stock_loss - patched_loss):.1e}")
    if DTYPE == torch.float32 and same < len(stock):
        raise SystemExit("texts differ")
    print("the loss is that of the unpatched model")


if __name__ == "__main__":
    typer.run(main)
