"""Transformers' continuous batching, from prompts to tokens."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

_PAGE = 256  # its own default
_MOST_BATCH_TOKENS = 8192  # its own default too
_PATIENCE_S = 120.0


class Continuous:
    """A manager that runs on, as `generate_batch` starts one for each call.

    Args:
        model: unpatched; its attention is what the manager makes of it.
        rows: prompts at a time.
        seqlen: tokens of a prompt, at most.
        tokens: that are generated, at most.

    Raises:
        ImportError: this transformers has none.
    """

    def __init__(self, model: Any, rows: int, seqlen: int, tokens: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.device = model.device
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=tokens
            ),
            # Left alone it takes nine tenths of the memory. A prefix that is kept from one turn to
            # the next would be a prompt that nobody computes.
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=rows * (math.ceil((seqlen + tokens) / _PAGE) + 1),
                max_batch_tokens=min(_MOST_BATCH_TOKENS, rows * (seqlen + tokens)),
                allow_block_sharing=False,
            ),
            workload_hints=WorkloadHints(seqlen, tokens, rows),
        )
        self._manager.warmup()
        self._manager.start()

    def generate(self, prompts: list[list[int]], count: int) -> Tensor:
        """Generates behind each prompt.

        Args:
            prompts: tokens of each.
            count: new tokens of each.

        Raises:
            RuntimeError: the manager gave up.
            TimeoutError: it neither did nor got ready.
        """
        wanted = self._manager.add_requests(inputs=prompts, max_new_tokens=count)
        found: dict[str, list[int]] = {}
        patience = time.perf_counter() + _PATIENCE_S
        while len(found) < len(wanted):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(str(result.error))
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not self._manager.is_running():
                raise RuntimeError("its thread ended")
            elif time.perf_counter() > patience:
                raise TimeoutError(f"no answer in {_PATIENCE_S:.0f} s")
        return torch.tensor([found[name] for name in wanted], device=self.device)

    def close(self) -> None:
        """Ends the manager's thread and gives its cache back."""
        self._manager.stop(block=True, timeout=10)
        self._manager.destroy()
        self._manager = None
