"""What the GPU tests of `varlen_attention` share: cases beside the CPU's, and who serves them."""

from __future__ import annotations

import random

import pytest
import torch

from attention_cases import CASES, Case
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.selection import select_backend

CUDA = "cuda"
# float32 has no fused kernel of this kind: torch_varlen rejects it and sdpa serves it.
SERVED = [
    ("torch_varlen", torch.bfloat16),
    ("torch_varlen", torch.float16),
    ("sdpa", torch.bfloat16),
    ("sdpa", torch.float16),
    ("sdpa", torch.float32),
    ("fa4", torch.bfloat16),
    ("fa4", torch.float16),
    ("fa3", torch.bfloat16),
    ("fa2", torch.bfloat16),
]

# Sizes of heads at which gradients of FlashAttention-4 are wrong on Hopper.
FA4_WRONG = (16, 72, 80, 104, 112)

# Beside the CPU's cases: every size of head that kernels are built for and some between,
# lengths on both sides of the tiles of 64, 128 and 256, one query a sequence (where the kernel
# takes grouped heads for queries) with and without a sequence that has none, and rows long enough
# for several tiles in both directions.
GPU_CASES = (
    *(case for case in CASES if case.head_dim % 8 == 0),
    *(Case(f"head_dim_{d}", (70, 0, 131), head_dim=d) for d in (16, 72, 80, 192, 256)),
    Case("mha_128", (127, 1, 129), num_heads=4, num_kv_heads=4, head_dim=128),
    Case("tiles_more_keys", (63, 128, 1, 65), (300, 129, 257, 65), num_heads=8, head_dim=128),
    Case("tiles_more_queries", (300, 129, 70), (63, 128, 70), num_heads=8),
    Case("empty_first_and_last", (0, 140, 0), (5, 140, 0)),
    Case("one_query_each", (1, 1, 1, 1), (300, 1, 64, 129)),
    Case("one_query_each_not_causal", (1, 1, 1, 1), (300, 1, 64, 129), causal=False),
    Case("one_query_or_none", (1, 0, 1), (300, 5, 64)),
    Case("one_query_or_none_not_causal", (1, 0, 1), (300, 5, 64), causal=False),
    Case("long_ragged", (1023, 257, 1, 2049, 0, 511), num_heads=4, head_dim=128),
    Case("long_not_causal", (700, 33), (1025, 511), num_heads=4, causal=False),
    Case("long_window", (1023, 257, 0, 511), num_heads=4, window_size=(200, None)),
    Case("window_more_keys_tiles", (63, 128, 1), (300, 129, 257), window_size=(64, None)),
    Case("window_both_tiles", (300, 65), (257, 90), causal=False, window_size=(70, 33)),
)
MASK_CASES = tuple(case for case in GPU_CASES if sum(case.keys) <= 1000)


def need(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Skips what is not installed, and cases that FlashAttention-4 would compile more kernels for.

    It compiles for seconds for each dtype, head_dim, group of heads and kind of mask.
    """
    q, k, v = case.inputs(dtype, CUDA)
    request = AttentionRequest.of(q, k, v, causal=case.causal, window_size=case.window_size)
    try:
        select_backend(request, backend)
    except BackendUnavailableError as error:
        open_window = case.window_size[1] is None and not case.causal
        if backend == "sdpa" or (backend == "torch_varlen" and not open_window):
            raise
        pytest.skip(str(error))
    if backend == "fa4":
        # Wrong on Hopper, which `auto` finds out: see the test of it.
        if case.head_dim in FA4_WRONG:
            pytest.skip(f"fa4 is not right at head_dim {case.head_dim}")
        usual = (case.num_heads, case.num_kv_heads, case.head_dim) == (6, 2, 64)
        if not usual and (dtype == torch.float16 or case.window_size != (None, None)):
            pytest.skip("one kind of heads stands for the others")


def draw_lengths(rng: random.Random) -> list[int]:
    """Draws a batch as training data has it: short and long documents, some empty."""
    return [*(rng.choice((0, 1, rng.randint(2, 700))) for _ in range(rng.randint(2, 9))), 5]
