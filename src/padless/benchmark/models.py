"""LLaMAs of a given width, several on one set of weights, and the work that a step takes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA.

    Attributes:
        hidden_size: of the residual stream.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        num_layers: decoder layers.
        intermediate_size: of the MLP.
        vocab_size: of embedding and head.
        rope_theta: base of the rotary frequencies.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 500000.0

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_heads

    def as_facts(self) -> dict[str, Any]:
        """Makes the entries of a record."""
        return {**asdict(self), "head_dim": self.head_dim}


# LLaMA-3-8B in all but its depth and its vocabulary.
LLAMA_8B_WIDTH = Shape(4096, 32, 8, 6, 14336, 32000)
SMOKE = Shape(64, 4, 2, 2, 96, 128)


def build_llama(shape: Shape, *, dtype: torch.dtype, device: str, longest: int) -> Any:
    """Builds a LlamaForCausalLM with random weights, in training mode, attention by SDPA.

    Args:
        shape: its sizes.
        dtype: of its weights.
        device: where it is built.
        longest: positions that it is made for.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.train()


def sharing_copy(model: Any, attn_implementation: str | None = None) -> Any:
    """Copies a model with its own modules and config, but the very same weights.

    Args:
        model: not patched.
        attn_implementation: of the copy, as transformers names it; None keeps the model's.

    Raises:
        ImportError: what the implementation needs is not installed.
    """
    shared: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    made = copy.deepcopy(model, shared)
    if attn_implementation is not None:
        made.set_attn_implementation(attn_implementation)
    return made


def trusted_sdpa() -> AbstractContextManager[Any]:
    """Keeps torch's SDPA from cuDNN, whose backward with a mask can give NaN, for a while."""
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


class Liger:
    """Applies Liger-Kernel to one model, and keeps it from all others in the process.

    Liger patches an instance's norms, MLPs and loss, but the rotary function for every LLaMA there
    is: that one is put in place for the turns of its models only.

    Raises:
        ImportError: liger-kernel is not installed.
    """

    def __init__(self) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        self._apply = apply_liger_kernel_to_llama
        self._rotary: Any = None

    def apply(self, model: Any) -> None:
        """Patches a model's modules."""
        from transformers.models.llama import modeling_llama

        before = dict(vars(modeling_llama))
        self._apply(model=model)
        self._rotary = modeling_llama.apply_rotary_pos_emb
        vars(modeling_llama).update(before)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Puts Liger's rotary function in place for a while."""
        from transformers.models.llama import modeling_llama

        before = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = self._rotary
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = before


def step_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Counts the work of forward and backward on real tokens, by the counting rule of `record`.

    Args:
        shape: of the model.
        lengths: of the sequences.
    """
    kv_size = shape.num_kv_heads * shape.head_dim
    per_layer = 2 * shape.hidden_size * (shape.hidden_size + kv_size)
    per_layer += 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_layers * per_layer + shape.hidden_size * shape.vocab_size
    attention = shape.num_layers * attention_flops(shape.num_heads, shape.head_dim, lengths)
    return 6.0 * sum(lengths) * weights + attention


def attention_flops(
    num_heads: int, head_dim: int, lengths: Sequence[int], *, backward: bool = True
) -> float:
    """Counts the work of causal attention.

    Args:
        num_heads: of queries.
        head_dim: numbers of a head.
        lengths: of the sequences.
        backward: whether its backward counts too.
    """
    forward = 2.0 * num_heads * head_dim * sum(n * n for n in lengths)
    return forward * (3.5 if backward else 1.0)
