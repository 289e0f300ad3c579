"""The verification in front of a benchmark: the patch path alone, on a small batch."""

from __future__ import annotations

import random
from typing import Any

import torch

from padless.benchmark.batches import make_batch
from padless.benchmark.distributions import SHORTEST
from padless.benchmark.reasons import is_out_of_memory
from padless.benchmark.timing import Progress
from padless.errors import UnsupportedError
from padless.verification import Check, verify
from padless.verification.measure import vocab_size

# What is verified first: small, half of it padding, as far as rows may be this long.
_VERIFIED_LENGTHS = (24, 7, 15, 3)
_VERIFIED_TOKENS = 8


def verified(
    model: Any, seqlen: int, seed: int, device: torch.device, tell: Progress
) -> tuple[Check, ...]:
    """Verifies the patch on a small batch of random tokens.

    Args:
        model: a LlamaForCausalLM.
        seqlen: the longest that a row may be.
        seed: of the tokens.
        device: of the model.
        tell: called with (stage, done, total).

    Raises:
        UnsupportedError: memory is too small for the copy of the model that it is compared with.
    """
    lengths = [max(SHORTEST, min(seqlen, length)) for length in _VERIFIED_LENGTHS]
    made = make_batch(lengths, max(lengths), vocab_size(model), random.Random(seed), device)
    inputs = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    try:
        report = verify(
            model,
            inputs,
            paths=("patch",),
            new_tokens=_VERIFIED_TOKENS,
            on_progress=lambda stage, done, total: tell(f"verifying: {stage}", done, total),
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UnsupportedError(
            "memory must hold a copy of the model in higher precision to verify it, got too little;"
            " cut layers, or leave the verification out"
        ) from error
    return report.paths[0].checks
