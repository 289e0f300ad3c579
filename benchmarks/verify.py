"""`padless verify` on the demo model, in half and single precision; keeps report and table."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from rich.console import Console

from padless.checkpoint import encode_batch, load_llama, load_tokenizer
from padless.cli.verify_table import print_report
from padless.demo import demo_texts, prepare_demo_model
from padless.verification import verify


def main() -> None:
    """Verifies the model in each precision; writes `verify-<dtype>-<device>` as json and txt."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/verify"))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtypes", default="bfloat16,float32", help="by commas")
    options.add_argument("--new-tokens", type=int, default=64)
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = prepare_demo_model()
    batch = encode_batch(load_tokenizer(folder), demo_texts(), padding_side="right")
    for dtype in arguments.dtypes.split(","):
        model = load_llama(folder, dtype=getattr(torch, dtype), device=arguments.device)
        report = verify(
            model,
            batch,
            new_tokens=arguments.new_tokens,
            name=f"SmolLM2-135M-Instruct ({type(model).__name__})",
        )
        slug = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
        stem = arguments.out / f"verify-{dtype}-{slug}"
        stem.with_suffix(".json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        with stem.with_suffix(".txt").open("w", encoding="utf-8") as file:
            print_report(report, Console(file=file, width=80))
        print_report(report, Console(width=80))


if __name__ == "__main__":
    main()
