"""A LLaMA whose norms matter, and a kernel for them planted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from padless.unpadded import norms

LAYERS, NEW = 2, 10
NORMS = 2 * LAYERS + 1


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        # Large enough to matter, so that one that is left out is seen.
        rms_norm_eps=0.05,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def plant_kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Says that torch has a kernel for the CPU; lists the shapes that it is given from now on."""
    seen: list[tuple[int, ...]] = []
    sound = F.rms_norm

    def rms_norm(x: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return sound(x, *args)

    monkeypatch.setattr(norms, "has_fused_rms_norm", lambda device_type: True)
    monkeypatch.setattr(norms.F, "rms_norm", rms_norm)
    return seen


def generate(model: Any, *, new: int = NEW, **options: Any) -> Tensor:
    ids = torch.arange(3, 18).view(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    options = {"do_sample": False, "max_new_tokens": new, **options}
    tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, **options)
    return tokens


def is_clean(model: nn.Module) -> bool:
    """Whether no norm of a model has a forward of its own."""
    return not any("forward" in vars(m) for m in model.modules() if type(m) is LlamaRMSNorm)
