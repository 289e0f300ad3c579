"""TRL's `SFTTrainer` with `packing`, on SDPA: no flash-attn, and no document sees another.

    python examples/sft_packing_trl.py --steps 4

TRL tells where documents are by `position_ids` and `cu_seq_lens_q`, and advises FlashAttention: by
transformers' SDPA such a row may be one document. A patched model keeps them apart by any backend.
The first loss is compared with that of every document by itself.
"""

import itertools
import tempfile
import time

import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import padless
from padless.demo import demo_texts, prepare_demo_model

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# What rounding leaves; a document that sees the one in front of it is far above it.
TOLERANCE = 0.05 if DTYPE == torch.bfloat16 else 1e-3


@torch.no_grad()
def loss_of_each(model, rows):
    """Computes the loss over documents, one at a time."""
    total = count = 0
    for ids in rows:
        ids = torch.tensor([ids], device=model.device)
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def main(steps: int = 4):
    """Fine-tune on packed documents."""
    folder = prepare_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    with tempfile.TemporaryDirectory() as output_dir:
        config = SFTConfig(
            output_dir,
            max_steps=steps,
            max_length=512,
            packing=True,
            per_device_train_batch_size=2,
            learning_rate=1e-5,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,  # the weights are, where there is a GPU
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        texts = Dataset.from_dict({"text": demo_texts()})
        trainer = SFTTrainer(model, config, train_dataset=texts, processing_class=tokenizer)
        handle = padless.patch(model)  # the one line, here or in front of the trainer
        trainer.add_callback(padless.TokensCallback(trainer))

        batch = next(iter(trainer.get_train_dataloader()))
        ends = batch["cu_seq_lens_q"].tolist()
        ids = batch["input_ids"][0].tolist()
        rows = [ids[start:end] for start, end in itertools.pairwise(ends)]
        apart = loss_of_each(trainer.model, rows)
        together = trainer.model(**batch).loss.item()

        start = time.perf_counter()
        trainer.train()
        step_ms = (time.perf_counter() - start) / steps * 1000

    logged = [record for record in trainer.state.log_history if "loss" in record]
    table = Table("SFTTrainer, packed", "")
    table.add_row("documents in the first row", f"{len(rows)}, {len(ids)} tokens")
    table.add_row("its loss, and that of each by itself", f"{together:.5f}, {apart:.5f}")
    table.add_row("loss, first and last step", f"{logged[0]['loss']:.4f}, {logged[-1]['loss']:.4f}")
    table.add_row("ms a step", f"{step_ms:.0f}")
    table.add_row("real tokens/s", f"{logged[-1]['real_tokens_per_second']:.0f}")
    Console().print(table)
    print(handle.report())
    if abs(together - apart) > TOLERANCE:
        raise SystemExit(f"documents see each other: losses differ by {abs(together - apart):.1e}")
    print("no document sees another")


if __name__ == "__main__":
    typer.run(main)
