"""What a sequence costs: a part that grows with its length and one that grows with its square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NEEDED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class SequenceCost:
    """Cost of a sequence of n tokens: `linear * n + quadratic * n * n`; only ratios count.

    Attributes:
        linear: of a token, in any unit; above 0.
        quadratic: of a pair of tokens, in the same unit; 0 or more.

    Raises:
        ValueError: a number is out of its range.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        if not (self.linear > 0 and math.isfinite(self.linear)):
            raise ValueError(f"linear must be a number above 0, got {self.linear}")
        if not (self.quadratic >= 0 and math.isfinite(self.quadratic)):
            raise ValueError(f"quadratic must be a number of 0 or more, got {self.quadratic}")

    @classmethod
    def from_config(cls, config: Any, *, attention_speed: float = 1.0) -> SequenceCost:
        """Counts the floating point operations of a training step.

        Two for each weight and token forward, four backward; causal attention half of
        `4 n**2 hidden_size` a layer forward, and 2.5 times that backward.

        Args:
            config: a `LlamaConfig`.
            attention_speed: operations a second that attention reaches, over those of the
                matrix products; 1 counts operations alone.

        Raises:
            ValueError: the config lacks a size, or attention_speed is not above 0.
        """
        missing = [name for name in _NEEDED if not getattr(config, name, None)]
        if missing:
            raise ValueError(
                f"config must be a LlamaConfig with {', '.join(_NEEDED)}, got one without "
                f"{', '.join(missing)}"
            )
        if not attention_speed > 0:
            raise ValueError(f"attention_speed must be above 0, got {attention_speed}")
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        attention = 2 * hidden * head_dim * (heads + kv_heads)  # q and o, k and v
        mlp = 3 * hidden * config.intermediate_size
        layers = config.num_hidden_layers
        weights = layers * (attention + mlp) + hidden * config.vocab_size
        pairs = 7.0 * layers * heads * head_dim
        return cls(6.0 * weights, pairs / attention_speed)

    def __call__(self, lengths: Tensor) -> Tensor:
        """Computes the cost of each sequence.

        Args:
            lengths: tokens, any shape.

        Returns:
            float64, of the same shape.
        """
        n = lengths.to(torch.float64)
        return n * (self.linear + self.quadratic * n)
