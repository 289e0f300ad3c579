"""A tiny LLaMA for `padless.bench`, and a bench of it in a second."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import padless
from padless.benchmark import timing, warmup


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def quick(model: Any = None, **options: Any) -> padless.BenchReport:
    chosen = {"batch": 3, "seqlen": 16, "peers": ("eager",), "seconds": 0.05, "verify_first": False}
    return padless.bench(tiny_model() if model is None else model, **{**chosen, **options})


def interrupt_at(monkeypatch: pytest.MonkeyPatch, turn: int) -> list[str]:
    """Raises KeyboardInterrupt in front of a turn, counted with the warm-up's; lists the turns."""
    taken: list[str] = []
    sound = timing.take

    def take(found: Any, *args: Any, **kwargs: Any) -> None:
        if len(taken) == turn:
            raise KeyboardInterrupt
        taken.append(found.timing.name)
        sound(found, *args, **kwargs)

    monkeypatch.setattr(timing, "take", take)
    monkeypatch.setattr(warmup, "take", take)
    return taken
