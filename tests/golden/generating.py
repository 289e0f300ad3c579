"""`generate` calls of the small models, and what a report has to say of them."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import LlamaForCausalLM

from golden.models import VERSION, batch
from golden.test_patch_cache import keys_and_values
from padless.unpadded.handle import PatchReport

# Where keys and values of a generate call are padless's own; below, its steps are transformers'.
IS_FAST = Version("4.48") <= VERSION
REAL = {"none": 39, "left": 25}


def generate(
    model: LlamaForCausalLM,
    padding: str = "left",
    *,
    new: int = 12,
    seqlen: int = 13,
    **options: Any,
) -> Any:
    ids, real = batch(padding, seqlen=seqlen)
    torch.manual_seed(7)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(**{"input_ids": ids, "attention_mask": real.long(), **options})


def check_fast(report: PatchReport, *, steps: int, prompt: int, calls: int = 1) -> None:
    """Asserts that the prompts were computed without padding, and what was behind them."""
    assert report.computed_tokens == prompt
    assert report.forwards == calls
    if not IS_FAST:
        assert report.generations == 0
        assert report.stock == {"a call behind a cache": steps}
        return
    assert (report.generations, report.decoding_steps) == (calls, steps)
    assert report.decoding_backends == {"sdpa": steps}
    assert report.stock == {} and report.generation_notes == {}


def check_cache(out: Any, stock: Any, real: Tensor) -> None:
    """Compares caches where tokens are; the prompt's mask is `real`."""
    caches = [keys_and_values(each.past_key_values) for each in (out, stock)]
    for a, b in zip(*caches, strict=True):
        assert a.shape == b.shape
        a, b = (x.transpose(1, 2) for x in (a, b))
        ones = real.new_ones(real.shape[0], a.shape[1] - real.shape[1])
        mask = torch.cat([real, ones], 1)
        torch.testing.assert_close(a[mask], b[mask], atol=1e-4, rtol=1e-4)
        assert a[~mask].abs().sum() == 0.0
