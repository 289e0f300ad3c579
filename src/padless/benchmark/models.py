"""LLaMAs of a given width, several on one set of weights, and the work that a step takes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from padless.environment import import_optional
from padless.errors import UnsupportedError


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
        head_size: numbers of a head where they are not hidden_size / num_heads.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 500000.0
    head_size: int | None = None

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.head_size or self.hidden_size // self.num_heads

    @classmethod
    def of_config(cls, config: Any) -> Shape:
        """Reads the sizes of a LLaMA from its config, of any version of transformers."""
        rope = getattr(config, "rope_parameters", None) or vars(config)
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            num_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            head_size=getattr(config, "head_dim", None),
        )

    def as_facts(self) -> dict[str, Any]:
        """Makes the entries of a record."""
        return {**asdict(self), "head_dim": self.head_dim}


# LLaMA-3-8B in all but its depth and its vocabulary.
LLAMA_8B_WIDTH = Shape(4096, 32, 8, 6, 14336, 32000)
SMOKE = Shape(64, 4, 2, 2, 96, 128)
# Public LLaMAs in full, by the names that the command line knows.
NAMED = {
    "llama-7b": Shape(4096, 32, 32, 32, 11008, 32000, 10000.0),
    "llama3-8b": Shape(4096, 32, 8, 32, 14336, 128256, 500000.0),
    "smollm2-135m": Shape(576, 9, 3, 30, 1536, 49152, 100000.0),
}


def cut(shape: Shape, num_layers: int | None) -> Shape:
    """Returns the shape with fewer layers.

    Args:
        shape: of the whole model.
        num_layers: how many; None leaves it as it is.

    Raises:
        ValueError: the shape has not so many.
    """
    if num_layers is None:
        return shape
    if not 1 <= num_layers <= shape.num_layers:
        raise ValueError(
            f"num_layers must be in 1 to {shape.num_layers}, the model's own, got {num_layers}"
        )
    return replace(shape, num_layers=num_layers)


def build_llama(shape: Shape, *, dtype: torch.dtype, device: str, longest: int) -> Any:
    """Builds a LlamaForCausalLM with random weights, in training mode, attention by SDPA.

    Args:
        shape: its sizes.
        dtype: of its weights.
        device: where it is built.
        longest: positions that it is made for.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=longest,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=False,
    )
    # Every version of transformers builds in the default dtype; how to name another one changed.
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(kept)
    return model.train()


def sharing_copy(model: Any, attn_implementation: str | None = None) -> Any:
    """Copies a model with its own modules and config, but the very same weights.

    Args:
        model: not patched.
        attn_implementation: of the copy, as transformers names it; None keeps the model's.

    Raises:
        ImportError: what the implementation needs is not installed.
        UnsupportedError: this transformers cannot change the implementation of a model.
    """
    shared: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    made = copy.deepcopy(model, shared)
    if attn_implementation is not None:
        if not hasattr(made, "set_attn_implementation"):
            raise UnsupportedError(
                f"transformers must have set_attn_implementation to run {attn_implementation} on "
                f"the weights of a loaded model, got an older one; upgrade transformers"
            )
        made.set_attn_implementation(attn_implementation)
    return made


def trusted_sdpa() -> AbstractContextManager[Any]:
    """Keeps torch's SDPA from cuDNN, whose backward with a mask can give NaN, for a while."""
    module, _ = import_optional("torch.nn.attention")
    if module is None:
        # Torch before 2.3, whose SDPA knows no cuDNN.
        return contextlib.nullcontext()
    kinds = module.SDPBackend
    return module.sdpa_kernel([kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH])


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
        try:
            self._apply(model=model)
            self._rotary = modeling_llama.apply_rotary_pos_emb
        finally:
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


def step_flops(shape: Shape, lengths: Sequence[int], *, backward: bool = True) -> float:
    """Counts the work of forward and backward on real tokens, by the counting rule of `record`.

    Args:
        shape: of the model.
        lengths: of the sequences.
        backward: whether its backward counts too.
    """
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    per_layer = 2 * shape.hidden_size * (q_size + kv_size)
    per_layer += 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_layers * per_layer + shape.hidden_size * shape.vocab_size
    attention = attention_flops(shape.num_heads, shape.head_dim, lengths, backward=backward)
    return (6.0 if backward else 2.0) * sum(lengths) * weights + shape.num_layers * attention


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
