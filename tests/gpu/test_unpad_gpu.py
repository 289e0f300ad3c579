"""The unpadding kernels on a GPU: what torch makes, by one transfer to the host."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import padless
import unpad_cases
from padless.kernels import unpad
from unpad_cases import CASES, UnpadCase

pytestmark = [pytest.mark.gpu, pytest.mark.requires("triton")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_make_what_torch_makes(case: UnpadCase) -> None:
    unpad_cases.assert_same(case, "cuda")


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed: int) -> None:
    unpad_cases.assert_same(unpad_cases.random_case(seed), "cuda")


@pytest.mark.parametrize("rows, seqlen", [(3, 5000), (700, 3), (2, 1024), (2, 1025)])
def test_rows_of_several_blocks_and_many_rows(rows: int, seqlen: int) -> None:
    torch.manual_seed(0)
    real = torch.rand(rows, seqlen) < 0.6
    words = tuple("".join("x" if there else "." for there in row) for row in real.tolist())
    unpad_cases.assert_same(UnpadCase(words), "cuda")


def test_trial_passes() -> None:
    assert unpad._fault(torch.device("cuda", 0)) is None


def test_a_forward_waits_for_the_device_once_and_compiles_nothing_for_a_new_shape() -> None:
    from padless.kernels import unpad_triton

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    handle = padless.patch(model)
    compiled = None
    for number, (rows, seqlen) in enumerate([(3, 16), (2, 33), (5, 48), (1, 7), (4, 1), (16, 31)]):
        ids = torch.randint(3, 64, (rows, seqlen), device="cuda")
        mask = torch.ones_like(ids)
        mask[: rows // 2, seqlen // 2 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if number else "default")
            try:
                model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        assert len(waits) == (1 if number else 0), waits
        kernels = (unpad_triton._count_kernel, unpad_triton._compact_kernel)
        cached = [sum(map(len, (entry[0] for entry in k.device_caches.values()))) for k in kernels]
        compiled = compiled or cached
        assert cached == compiled and all(cached)
    assert handle.report().forwards == 6 and handle.report().host_syncs == 6
