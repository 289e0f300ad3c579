"""Names of rows: what the scripts write and the tables and targets look for."""

from __future__ import annotations

from padless.benchmark.names import PADLESS as PADLESS
from padless.benchmark.names import with_liger as with_liger

EAGER = "transformers eager"
SDPA = "transformers sdpa (default)"
SDPA_COMPILED = "transformers sdpa, torch.compile"
SDPA_NO_MASK = "transformers sdpa, mask dropped"
SDPA_NO_CUDNN = "transformers sdpa, cuDNN off"
SDPA_STATIC = "transformers sdpa, static cache"
SDPA_STATIC_COMPILED = "transformers sdpa, static cache, torch.compile"
CONTINUOUS = "transformers continuous batching"
CONTINUOUS_FA4 = "transformers continuous batching, flash_attention_4"
FA4 = "transformers flash_attention_4"
FA4_BY_HAND = "transformers flash_attention_4, flattened by hand"
PADLESS_TORCH = "padless, torch alone"
ORIGINAL_FLASH = "the original, flash path"
ORIGINAL_SDPA = "the original, sdpa path"
FLOOR = "floor: products and kernel alone"
FLOOR_ONE_PRODUCT = "floor: the same, q k v as one product"
ONE_GPU = "one GPU"
ULYSSES = "padless, Ulysses"
ULYSSES_OVERLAPPED = "padless, Ulysses, overlapped in two parts"
RING = "padless, ring"
ULYSSES_BY_HAND = "Ulysses by hand, nothing overlapped"
CONTEXT_PARALLEL = "torch context_parallel"
SHUFFLED = "shuffled, as many samples each (DistributedSampler)"
REBALANCED = "transformers BatchRebalanceSampler"
BALANCED = "padless BalancedBatchSampler"

FLOORS = (FLOOR, FLOOR_ONE_PRODUCT)
GENERATION_PEERS = (
    SDPA, SDPA_NO_CUDNN, SDPA_STATIC, SDPA_STATIC_COMPILED, FA4, CONTINUOUS, CONTINUOUS_FA4,
)  # fmt: skip


def on_one_rank(name: str) -> str:
    """Makes the name of a sampler's row where one rank trains alone."""
    return f"{name}, one rank"
