"""A training step of a small LLaMA on the CPU, in float32: padless on a padded batch or nothing."""

from __future__ import annotations

import random

import torch

from benchmarks import names
from benchmarks.record import Record, parser
from benchmarks.step_variants import TrainingStep
from padless.benchmark.batches import draw_lengths, make_batch
from padless.benchmark.models import SMOKE, Shape, step_flops
from padless.benchmark.timing import measure

_SHAPE = Shape(576, 9, 3, 6, 1536, 8192)


def main() -> None:
    """Measures the step and writes the record."""
    arguments = parser(__doc__, seconds=35).parse_args()
    arguments.device = "cpu"
    record = Record("cpu_step", arguments)
    shape, rows, seqlen = (SMOKE, 4, 32) if record.smoke else (_SHAPE, 8, 256)
    rng = random.Random(arguments.seed)
    lengths = draw_lengths(rows, seqlen, 0.5, rng)
    batch = make_batch(lengths, seqlen, shape.vocab_size, rng, "cpu")
    step = TrainingStep(shape, torch.float32, "cpu", longest=seqlen)
    step.find_truth(batch)
    builders = step.builders()
    timings = measure(
        {name: builders[name] for name in (names.EAGER, names.SDPA, names.PADLESS)},
        record.clock,
        draw=lambda index: batch,
        seconds=arguments.seconds,
        warmup=2,
        seed=arguments.seed,
    )
    record.add(
        f"{rows} x {seqlen}, 50 % real",
        timings,
        flops=step_flops(shape, lengths),
        tokens_real=sum(lengths),
        tokens_padded=rows * seqlen,
        lengths=lengths,
        dtype="float32",
        model=shape.as_facts(),
    )


if __name__ == "__main__":
    main()
