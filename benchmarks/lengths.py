"""One attention layer from 2k to 128k tokens: time over the floor, and memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from benchmarks import names
from benchmarks.attention_layer import AttentionLayer
from benchmarks.layer_batch import LayerBatch
from benchmarks.record import Record, parser
from padless.benchmark.models import Shape
from padless.benchmark.timing import measure
from padless.benchmark.variant import Timing

TOKENS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SHAPE = Shape(4096, 32, 8, 1, 0, 0)
_MEAN_DOCUMENT = 2048
# Transformers' default needs a mask of tokens by tokens for documents.
_LARGEST_DENSE_MASK = 16384


def main() -> None:
    """Measures every length and writes the record."""
    options = parser(__doc__, seconds=40)
    options.add_argument("--longest", type=int, default=TOKENS[-1], help="leave out longer ones")
    arguments = options.parse_args()
    record = Record("lengths", arguments)
    tokens = [n for n in TOKENS if n <= arguments.longest]
    if record.smoke:
        tokens = [64, 128]
    rng = random.Random(arguments.seed)
    for total, both_s in share_out(arguments.seconds, tokens).items():
        seconds = both_s / 2
        _measure_length(record, [total], seconds, arguments.seed)
        documents = _documents(total, total // 4 if record.smoke else _MEAN_DOCUMENT, rng)
        _measure_length(record, documents, seconds, arguments.seed)


def share_out(seconds: float, tokens: Sequence[int]) -> dict[int, float]:
    """Shares measuring time out: half of it by tokens, and half in equal parts.

    By tokens alone, the shortest of these would be measured once.

    Args:
        seconds: of all.
        tokens: of each length, no two alike.

    Returns:
        Seconds of each, by its tokens.
    """
    each, by_token = seconds / 2 / len(tokens), seconds / 2 / sum(tokens)
    return {total: each + by_token * total for total in tokens}


def _measure_length(record: Record, lengths: Sequence[int], seconds: float, seed: int) -> None:
    total = sum(lengths)
    shape = Shape(64, 4, 2, 1, 0, 0) if record.smoke else _SHAPE
    device = "cuda" if record.clock.is_cuda else "cpu"
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    batch = LayerBatch.draw_documents(lengths, shape.hidden_size, dtype, device)
    layer = AttentionLayer(shape, batch, dtype, device)
    builders = layer.builders()
    wanted = [names.SDPA, names.FA4, names.FA4_BY_HAND, names.PADLESS, *names.FLOORS]
    too_dense = len(lengths) > 1 and total > _LARGEST_DENSE_MASK
    if too_dense:
        wanted.remove(names.SDPA)
    else:
        layer.find_truth()
    timings = measure(
        {name: builders[name] for name in wanted if name in builders},
        record.clock,
        draw=lambda index: batch,
        seconds=seconds,
        warmup=2,
        min_rounds=3,
        seed=seed,
    )
    if too_dense:
        bytes_needed = total**2
        reason = f"its mask alone would take {bytes_needed / 2**30:.0f} GiB"
        timings.insert(0, Timing(names.SDPA, reason))
    kind = "one sequence" if len(lengths) == 1 else "packed documents"
    record.add(
        f"{total} tokens, {kind}",
        timings,
        flops=layer.flops,
        tokens_real=total,
        tokens_padded=total,
        kind=kind,
        lengths=list(lengths),
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def _documents(total: int, mean: int, rng: random.Random) -> list[int]:
    """Cuts a row into documents of uniform random lengths, at least two."""
    lengths: list[int] = []
    mean = min(mean, total // 2)
    while (rest := total - sum(lengths)) > 0:
        lengths.append(min(rest, rng.randint(max(1, mean // 8), 2 * mean - mean // 8)))
    if len(lengths) == 1:
        lengths = [total // 2, total - total // 2]
    return lengths


if __name__ == "__main__":
    main()
