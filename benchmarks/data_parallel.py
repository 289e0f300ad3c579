"""Weak scaling of data parallel training on padded batches, with and without the balanced sampler.

    torchrun --nproc-per-node 2 -m benchmarks.data_parallel

First rank 0 trains alone, then all ranks together, on batches of the same size. Efficiency is the
real tokens a second of all ranks, over their number times those of one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import padless
from benchmarks import names
from benchmarks.balance import lognormal_lengths, plans_of, sequence_cost
from benchmarks.record import Record, parser
from padless.benchmark.batches import make_batch
from padless.benchmark.clock import Clock
from padless.benchmark.models import LLAMA_8B_WIDTH, SMOKE, Shape, build_llama
from padless.benchmark.variant import Timing

_SAMPLERS = (names.SHUFFLED, names.BALANCED)
_WARMUP = 3


def main() -> None:
    """Trains by each sampler on one rank and on all, and writes the record on rank 0."""
    options = parser(__doc__, seconds=0)
    options.add_argument("--steps", type=int, default=30, help="measured steps of each run")
    arguments = options.parse_args()
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size < 2:
        options.error("needs two ranks or more: torchrun --nproc-per-node 2 -m ...")
    device = arguments.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    record = Record("data_parallel", arguments) if rank == 0 else None
    timings, facts = _measure(arguments, rank, size)
    if record is not None:
        record.add("lognormal, median 400", timings, backend=dist.get_backend(), **facts)
    # A rank that leaves closes sockets that others may still read.
    dist.barrier()
    # No DistributedDataParallel is left by now. One that outlived torch's own tables would be the
    # group's last owner, and wait for Gloo's thread with the interpreter's lock, which that thread
    # may be waiting for.
    dist.destroy_process_group()


def _measure(arguments: Any, rank: int, size: int) -> tuple[list[Timing], dict[str, Any]]:
    """Trains by each sampler on one rank and on all.

    Returns:
        This rank's timings, and what was trained.
    """
    device, is_small = arguments.device, arguments.smoke
    shape, longest, max_tokens = (SMOKE, 64, 128) if is_small else (LLAMA_8B_WIDTH, 8192, 16384)
    steps = 2 if is_small else arguments.steps
    lengths = lognormal_lengths(200 if is_small else 20_000, longest, arguments.seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    model = build_llama(shape, dtype=dtype, device=device, longest=longest)
    padless.patch(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    clock = Clock(device)
    timings = []
    for name in _SAMPLERS:
        rates: dict[int, float] = {}
        for ranks in (1, size):
            plan = plans_of(lengths, max_tokens, sequence_cost(shape), arguments.seed, ranks)[name]
            if rank < ranks:
                batches = plan(rank)[: _WARMUP + steps]
                wrapped = parallel if ranks == size else model
                times, tokens = _train(wrapped, batches, lengths, shape, clock, ranks)
                rates[ranks] = 1e3 * tokens / sum(times)
                facts: dict[str, Any] = {"ranks": ranks, "tokens_a_second": rates[ranks]}
                if ranks == size and rank == 0:
                    facts["efficiency"] = rates[size] / (size * rates[1])
                label = name if ranks == size else names.on_one_rank(name)
                timings.append(Timing(label, samples={"forward_backward": times}, facts=facts))
            dist.barrier()
    return timings, {
        "ranks": size,
        "max_tokens": max_tokens,
        "longest": longest,
        "dtype": str(dtype).removeprefix("torch."),
        "model": shape.as_facts(),
    }


def _train(
    model: Any,
    batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    shape: Shape,
    clock: Clock,
    ranks: int,
) -> tuple[list[float], int]:
    """Runs forward and backward on each batch, gradients averaged over the ranks.

    Returns:
        Milliseconds of each measured step, which all ranks wait for, and the real tokens of all
        ranks in those steps.
    """
    device = "cuda" if clock.is_cuda else "cpu"
    made = []
    for number, samples in enumerate(batches):
        rows = tuple(lengths[i] for i in samples)
        made.append(make_batch(rows, max(rows), shape.vocab_size, random.Random(number), device))
    marks = []
    for batch in made:
        clock.settle()
        start = clock.mark()
        model(**batch.padded()).loss.backward()
        model.zero_grad(set_to_none=True)
        clock.settle()
        marks.append((start, clock.mark()))
    clock.settle()
    times = [clock.elapsed_ms(*pair) for pair in marks[_WARMUP:]]
    tokens = torch.tensor(sum(sum(batch.lengths) for batch in made[_WARMUP:]), device=device)
    if ranks > 1:
        dist.all_reduce(tokens)
    return times, int(tokens)


if __name__ == "__main__":
    main()
