"""Batched generation in all its variants, on one set of weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import padless
from benchmarks import names
from benchmarks.continuous import Continuous
from benchmarks.prompts import Prompts
from padless.benchmark.models import Shape, build_llama, sharing_copy, trusted_sdpa
from padless.benchmark.reasons import free_memory

_logger = logging.getLogger("benchmarks")


@dataclass
class Generating:
    """One way to generate.

    Attributes:
        generate: from prepared prompts and a number to so many new tokens, `(batch, number)`.
        prepare: makes what `generate` takes, untimed.
        context: is entered for each turn, outside the measured time.
        facts: for the row, asked after the first turn.
        close: gives back what it holds.
        has_thread: whether its turns run in a thread of their own: torch keeps cuDNN's plans for
            attention by thread, so that no variant profits from those that another paid for.
    """

    generate: Callable[[Any, int], Tensor]
    prepare: Callable[[Prompts], Any] = Prompts.padded
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: Callable[[], dict[str, Any]] = dict
    close: Callable[[], None] = lambda: None
    has_thread: bool = True


Builder = Callable[[], Generating]

# Roundings of a score by which two first tokens may differ and be equally good.
_TIE = 4


class Truth(NamedTuple):
    """What variants have to generate.

    Attributes:
        tokens: int64 `(batch, number)`.
        ties: bool `(batch, vocab_size)`, first tokens that score as high to some roundings.
    """

    tokens: Tensor
    ties: Tensor


class Generation:
    """Variants of batched greedy generation, in which no row ends early.

    Args:
        shape: of the model.
        dtype: of its weights.
        device: "cuda" or "cpu".
        longest: positions that it is made for.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, longest: int) -> None:
        self.shape = shape
        self.device = device
        self.model = build_llama(shape, dtype=dtype, device=device, longest=longest).eval()
        # Without an end of text all rows run on; transformers fills in what a call leaves open.
        for config in (self.model.config, self.model.generation_config):
            config.eos_token_id = None
            config.pad_token_id = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a token cannot do without: all but the embedding table."""
        table = self.model.get_input_embeddings().weight
        return self.weight_bytes - table.numel() * table.element_size()

    def cache_bytes(self, tokens: int) -> int:
        """Counts the keys and values of some tokens."""
        itemsize = self.model.dtype.itemsize
        per_layer = 2 * self.shape.num_kv_heads * self.shape.head_dim * itemsize
        return tokens * self.shape.num_layers * per_layer

    def builders(
        self, rows: int, seqlen: int, tokens: int, *, with_compile: bool = False
    ) -> dict[str, Builder]:
        """Returns what makes each variant.

        Args:
            rows: of the batches to come.
            seqlen: their slots, at most.
            tokens: that are generated, at most.
            with_compile: whether to take transformers' own torch.compile along, slow to build.
        """
        continuous = functools.partial(self.continuous, rows, seqlen, tokens)
        made: dict[str, Builder] = {
            names.SDPA: functools.partial(self.stock, "sdpa"),
            names.SDPA_NO_CUDNN: functools.partial(self.stock, "sdpa", context=trusted_sdpa),
            names.SDPA_STATIC: functools.partial(
                self.stock, "sdpa", cache_implementation="static", disable_compile=True
            ),
        }
        if with_compile:
            made[names.SDPA_STATIC_COMPILED] = self.compiled
        backend = "torch_varlen" if self.device == "cuda" else "sdpa"
        return {
            **made,
            names.FA4: functools.partial(self.stock, "flash_attention_4"),
            names.PADLESS: functools.partial(self.padless, "auto"),
            names.PADLESS_TORCH: functools.partial(self.padless, backend),
            names.CONTINUOUS: functools.partial(continuous, "sdpa"),
            names.CONTINUOUS_FA4: functools.partial(continuous, "flash_attention_4"),
        }

    def stock(
        self,
        attention: str,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> Generating:
        """Transformers as it is.

        Args:
            attention: name of its implementation.
            context: of a turn.
            options: of `generate`.
        """
        model = sharing_copy(self.model, attention)
        return Generating(functools.partial(_generate, model, options), context=context)

    def compiled(self) -> Generating:
        """Transformers with a static cache, whose decoding it then compiles by itself."""
        if self.device != "cuda":
            raise RuntimeError("transformers compiles on a GPU only")
        made = self.stock("sdpa", cache_implementation="static")
        made.facts = lambda: {"compiled": True}
        made.close = torch.compiler.reset
        # Inductor keeps its CUDA graphs for the main thread.
        made.has_thread = False
        return made

    def padless(self, backend: str) -> Generating:
        """A patched model.

        Args:
            backend: of `varlen_attention`.
        """
        model = sharing_copy(self.model)
        handle = padless.patch(model, backend=backend)

        def facts() -> dict[str, Any]:
            report = handle.report()
            kernels = {name for layer in report.layers for name in layer.backends}
            return {
                "kernel": ", ".join(sorted(kernels)),
                "forwards": report.forwards,
                "left_to_transformers": dict(report.stock),
            }

        return Generating(
            functools.partial(_generate, model, {}), facts=facts, close=handle.undo
        )  # fmt: skip

    def continuous(self, rows: int, seqlen: int, tokens: int, attention: str) -> Generating:
        """Transformers' continuous batching, its manager kept running.

        Args:
            rows: of the batches to come.
            seqlen: their slots, at most.
            tokens: that are generated, at most.
            attention: name of its implementation.
        """
        manager = Continuous(sharing_copy(self.model, attention), rows, seqlen, tokens)
        return Generating(manager.generate, prepare=Prompts.listed, close=manager.close)

    def find_truth(self, prompts: Prompts, tokens: int) -> Truth | None:
        """Generates what the variants have to, by transformers' default; None if it does not fit.

        Args:
            prompts: of any width.
            tokens: how many.
        """
        made = self.stock("sdpa")
        try:
            with trusted_sdpa():
                inputs = made.prepare(prompts)
                found = made.generate(inputs, tokens).cpu()
                return Truth(found, _equally_good(self.model, inputs))
        except RuntimeError as error:
            # Not of the batch's size alone: some kernels fail before the memory is full.
            _logger.warning("tokens are not compared: %s", str(error).splitlines()[0])
        free_memory()
        return None


def _equally_good(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Finds the first tokens that score as high as the best: `(batch, vocab_size)`."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    scores = model.generate(**inputs, max_new_tokens=1, **options).logits[0].float().cpu()
    best = scores.amax(-1, keepdim=True)
    return scores >= best - _TIE * torch.finfo(model.dtype).eps * best.abs()


def _generate(model: Any, options: dict[str, Any], inputs: dict[str, Tensor], count: int) -> Tensor:
    found = model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
    new: Tensor = found[:, inputs["input_ids"].shape[1] :]
    return new
