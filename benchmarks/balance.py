"""How far ranks are apart in a step, by the samplers that users have and by the balanced one.

Needs no GPU: what is compared is the cost of the batches, by the work that their sequences take.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from benchmarks import names
from benchmarks.record import Record, parser
from padless import BalancedBatchSampler, Imbalance, SequenceCost
from padless.benchmark.models import SMOKE, Shape
from padless.benchmark.variant import Timing

RANKS = 8
_LLAMA_8B = Shape(4096, 32, 8, 32, 14336, 128256)


def main() -> None:
    """Plans an epoch of each set of lengths by each sampler and writes the record."""
    arguments = parser(__doc__, seconds=0).parse_args()
    arguments.device = "cpu"
    record = Record("balance", arguments)
    shape = SMOKE if record.smoke else _LLAMA_8B
    cost = sequence_cost(shape)
    samples = 400 if record.smoke else 20_000
    for case, lengths, max_tokens in length_sets(samples, arguments.seed):
        rows = []
        for name, plan in plans_of(lengths, max_tokens, cost, arguments.seed, RANKS).items():
            begin = time.perf_counter()
            try:
                ranks = [plan(rank) for rank in range(RANKS)]
            except ImportError as error:
                rows.append(Timing(name, reason=str(error)))
                continue
            planned_s = (time.perf_counter() - begin) / RANKS
            found = Imbalance.of_batches(ranks, lengths, cost)
            facts = {"steps": found.steps, "imbalance": found.epoch, "worst": found.worst}
            rows.append(Timing(name, facts={**facts, "planned_s": planned_s}))
        record.add(
            case,
            rows,
            ranks=RANKS,
            samples=len(lengths),
            max_tokens=max_tokens,
            median=sorted(lengths)[len(lengths) // 2],
            longest=max(lengths),
            model=shape.as_facts(),
        )


def length_sets(samples: int, seed: int) -> list[tuple[str, list[int], int]]:
    """Makes sets of lengths.

    Args:
        samples: of each drawn set; of the measured one at most so many.
        seed: of what is drawn.

    Returns:
        Name, tokens of each sample, and the token budget of a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.empty(samples).log_normal_(7.0, 1.4, generator=generator)
    sources = source_lengths(samples)
    random.Random(seed).shuffle(sources)
    return [
        ("lognormal, median 400", lognormal_lengths(samples, 8192, seed), 16384),
        ("lognormal, median 1100, long tail", heavy.long().clamp(1, 32768).tolist(), 32768),
        ("source files of Python's standard library", sources, 16384),
    ]


def source_lengths(most: int) -> list[int]:
    """Reads the sizes of the source files of Python's standard library, four bytes a token."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    own = [file for file in files if "site-packages" not in file.parts]
    return [max(1, min(file.stat().st_size // 4, 16384)) for file in own][:most]


def lognormal_lengths(samples: int, longest: int, seed: int) -> list[int]:
    """Draws lengths as instruction sets have them: a median of 400 tokens and a long tail."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(samples).log_normal_(6.0, 1.0, generator=generator)
    return drawn.long().clamp(1, longest).tolist()


def plans_of(
    lengths: Sequence[int], max_tokens: int, cost: SequenceCost, seed: int, ranks: int
) -> dict[str, Callable[[int], list[list[int]]]]:
    """Makes for each sampler what plans the epoch of a rank.

    Args:
        lengths: tokens of each sample.
        max_tokens: of a batch; those that fill by samples take as many as hold it on average.
        cost: of a sequence.
        seed: of the samplers.
        ranks: that take different batches.
    """
    size = max(1, max_tokens * len(lengths) // sum(lengths))

    def shuffled(rank: int) -> list[list[int]]:
        data: Any = range(len(lengths))
        order: list[int] = list(DistributedSampler(data, ranks, rank, seed=seed))
        return [order[first : first + size] for first in range(0, len(order), size)]

    def rebalanced(rank: int) -> list[list[int]]:
        from transformers.trainer_pt_utils import BatchRebalanceSampler

        return list(BatchRebalanceSampler(list(lengths), size * ranks, ranks, 1, rank=rank))

    def balanced(rank: int) -> list[list[int]]:
        return list(
            BalancedBatchSampler(
                lengths, max_tokens, cost=cost, num_replicas=ranks, rank=rank, seed=seed
            )
        )

    return {
        names.SHUFFLED: shuffled, names.REBALANCED: rebalanced, names.BALANCED: balanced,
    }  # fmt: skip


def sequence_cost(shape: Shape) -> SequenceCost:
    """Counts the work of a sequence in a model of this shape."""
    return SequenceCost.from_config(
        SimpleNamespace(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            num_hidden_layers=shape.num_layers,
            vocab_size=shape.vocab_size,
        )
    )


if __name__ == "__main__":
    main()
