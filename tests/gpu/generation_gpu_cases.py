"""The model and the `generate` calls of the tests of generation on a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LAYERS, EAGER_STEPS = 512, 3, 1
LENGTHS = (70, 41, 17, 1)
HEADS = {"mha": 8, "gqa": 2}
DTYPES = [torch.float32, torch.bfloat16]


def build_model(
    dtype: torch.dtype = torch.float32, *, heads: str = "gqa", head_dim: int = 64
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8 * 64,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=HEADS[heads],
        head_dim=head_dim,
        max_position_embeddings=2048,
        # Attention far from uniform, and tokens that differ.
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def prompt_of(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    columns = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), columns), generator=generator)
    real = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~real, 0).cuda(),
        "attention_mask": real.long().cuda(),
    }


def generate(
    model: LlamaForCausalLM, lengths: tuple[int, ...] = LENGTHS, *, new: int = 48, **options: Any
) -> Any:
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
    return model.generate(**prompt_of(lengths), **options)
