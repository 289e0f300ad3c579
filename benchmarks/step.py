"""A training step, forward and backward, on padded batches: padless and what else there is."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import names
from benchmarks.record import Record, parser
from benchmarks.step_variants import TrainingStep
from padless.benchmark.batches import Batch, draw_lengths, make_batch
from padless.benchmark.models import LLAMA_8B_WIDTH, SMOKE, step_flops
from padless.benchmark.timing import measure
from padless.benchmark.training_step import widening
from padless.benchmark.variant import Variant

# Key for the command line, rows, slots of a row, share of real tokens, new lengths at every step.
Case = tuple[str, int, int, float, bool]
CASES: tuple[Case, ...] = (
    ("47", 8, 2048, 0.47, False),
    ("67", 2, 8192, 0.67, False),
    ("all", 8, 2048, 1.0, False),
    ("new", 8, 2048, 0.47, True),
)
_SMOKE_CASES: tuple[Case, ...] = (("47", 4, 32, 0.47, False), ("new", 4, 256, 0.47, True))
_WARMUP = 3
# With new lengths every turn counts, and those that wait for a plan are slow.
_WITHOUT_NEW_LENGTHS = (names.EAGER, names.SDPA_COMPILED)


def main() -> None:
    """Measures every case and writes the record."""
    options = parser(__doc__, seconds=56)
    options.add_argument("--cases", help="some of 47, 67, all, new; by commas")
    options.add_argument("--layers", type=int, help="instead of the model's 6")
    options.add_argument("--compile", action="store_true", help="torch.compile of the default too")
    options.add_argument("--no-eager", action="store_true", help="leave out eager attention")
    arguments = options.parse_args()
    record = Record("step", arguments)
    cases = _SMOKE_CASES if record.smoke else CASES
    if arguments.cases:
        cases = tuple(case for case in cases if case[0] in arguments.cases.split(","))
    shape = SMOKE if record.smoke else LLAMA_8B_WIDTH
    if arguments.layers:
        shape = type(shape)(**{**vars(shape), "num_layers": arguments.layers})
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    step = TrainingStep(shape, dtype, arguments.device, longest=max(case[2] for case in cases))
    builders = step.builders(
        with_eager=not arguments.no_eager, with_compile=arguments.compile and not record.smoke
    )
    for case in cases:
        _measure_case(record, step, builders, case, arguments, arguments.seconds / len(cases))


def _measure_case(
    record: Record,
    step: TrainingStep,
    builders: dict[str, Callable[[], Variant]],
    case: Case,
    arguments: argparse.Namespace,
    seconds: float,
) -> None:
    _, rows, seqlen, share, is_new = case
    rng = random.Random(arguments.seed)
    drawn: list[Batch] = []
    if is_new:
        builders = {
            name: widening(build, columns)
            for columns, (name, build) in enumerate(builders.items())
            if not name.startswith(_WITHOUT_NEW_LENGTHS)
        }
    widths = _widths(seqlen, len(step.builders()), rng)

    def draw(index: int) -> Batch:
        if not drawn or (is_new and index >= len(drawn)):
            slots = widths[index % len(widths)] if is_new else seqlen
            lengths = draw_lengths(rows, slots, share, rng)
            vocab_size = step.shape.vocab_size
            drawn.append(make_batch(lengths, slots, vocab_size, rng, arguments.device))
        return drawn[index] if is_new else drawn[0]

    first = draw(0)
    step.find_truth(first)
    timings = measure(
        builders,
        record.clock,
        draw=draw,
        seconds=seconds,
        repeats=2 if is_new else 1,
        warmup=_WARMUP,
        max_rounds=max(1, len(widths) - _WARMUP) if is_new else 200,
        seed=arguments.seed,
    )
    percent = "all" if share >= 1 else f"{100 * share:.0f} %"
    facts: dict[str, Any] = {}
    if not is_new:
        facts = {"lengths": first.lengths, "tokens_padded": rows * seqlen}
        facts["tokens_real"] = sum(first.lengths)
        facts["flops"] = step_flops(step.shape, first.lengths)
    else:
        facts["lengths_a_step"] = [batch.lengths for batch in drawn]
        facts["seqlens"] = [batch.input_ids.shape[1] for batch in drawn]
    record.add(
        f"{rows} x {seqlen}, {percent} real" + (", new lengths at every step" if is_new else ""),
        timings,
        dtype=str(next(step.model.parameters()).dtype).removeprefix("torch."),
        new_lengths=is_new,
        share=share,
        model=step.shape.as_facts(),
        **facts,
    )


def _widths(seqlen: int, apart: int, rng: random.Random) -> list[int]:
    """Draws widths of batches, from three quarters of seqlen on, none near to another.

    Each variant pads its batch by some columns more than the one in front of it (`widening`): what
    is kept by shape, such as a plan of cuDNN, must not serve two of them.
    """
    widths = list(range(3 * seqlen // 4, seqlen - apart, apart + 1))
    rng.shuffle(widths)
    return widths


if __name__ == "__main__":
    main()
