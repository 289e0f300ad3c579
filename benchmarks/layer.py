"""One attention layer: padless, the original's two paths, transformers, and the floor."""

from __future__ import annotations

import functools
import random

import torch

from benchmarks.attention_layer import AttentionLayer
from benchmarks.layer_batch import LayerBatch
from benchmarks.record import Record, parser
from padless.benchmark.batches import draw_lengths
from padless.benchmark.models import Shape
from padless.benchmark.timing import measure

# Name, heads, KV heads, rows, slots of a row, share of real tokens.
CASES = (
    ("MHA, 8 x 2048, 47 % real", 32, 32, 8, 2048, 0.47),
    ("MHA, 2 x 8192, 67 % real", 32, 32, 2, 8192, 0.67),
    ("MHA, 8 x 2048, all real", 32, 32, 8, 2048, 1.0),
    ("GQA 32/8, 8 x 2048, 47 % real", 32, 8, 8, 2048, 0.47),
    ("GQA 32/8, 8 x 2048, all real", 32, 8, 8, 2048, 1.0),
)
_HIDDEN = 4096
_SMOKE = (
    ("MHA, 47 % real", 4, 4, 4, 32, 0.47),
    ("GQA 4/2, all real", 4, 2, 4, 32, 1.0),
)


def main() -> None:
    """Measures every case and writes the record."""
    options = parser(__doc__, seconds=40)
    arguments = options.parse_args()
    record = Record("layer", arguments)
    cases = _SMOKE if record.smoke else CASES
    hidden_size = 64 if record.smoke else _HIDDEN
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    for case, num_heads, num_kv_heads, rows, seqlen, share in cases:
        rng = random.Random(arguments.seed)
        lengths = draw_lengths(rows, seqlen, share, rng)
        shape = Shape(hidden_size, num_heads, num_kv_heads, 1, 0, 0)
        batch = LayerBatch.draw(lengths, seqlen, hidden_size, dtype, arguments.device)
        layer = AttentionLayer(shape, batch, dtype, arguments.device)
        layer.find_truth()
        timings = measure(
            layer.builders(),
            record.clock,
            draw=functools.partial(_same, batch),
            seconds=arguments.seconds / len(cases),
            inference=True,
            seed=arguments.seed,
        )
        record.add(
            case,
            timings,
            flops=layer.flops,
            tokens_real=sum(lengths),
            tokens_padded=rows * seqlen,
            lengths=lengths,
            dtype=str(dtype).removeprefix("torch."),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=shape.head_dim,
        )
        del layer, batch


def _same(batch: LayerBatch, index: int) -> LayerBatch:
    return batch


if __name__ == "__main__":
    main()
