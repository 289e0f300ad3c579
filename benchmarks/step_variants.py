"""The measured model's training step, in all its variants, with and without Liger."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import names
from padless.benchmark import training_step
from padless.benchmark.batches import Batch
from padless.benchmark.models import Shape, build_llama
from padless.benchmark.training_step import Builder
from padless.benchmark.variant import Variant


class TrainingStep(training_step.TrainingStep):
    """Variants of a training step.

    Args:
        shape: of the model.
        dtype: of its weights.
        device: "cuda" or "cpu".
        longest: positions that it is made for.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, longest: int) -> None:
        self.shape = shape
        self.device = device
        super().__init__(build_llama(shape, dtype=dtype, device=device, longest=longest))

    def builders(
        self, *, with_eager: bool = True, with_compile: bool = False
    ) -> dict[str, Builder]:
        """Returns what makes each variant, each with and without Liger.

        Args:
            with_eager: whether to take transformers' eager attention along, slow and large.
            with_compile: whether to take torch.compile of the default along, slow to build.
        """
        made: dict[str, Builder] = {}

        def add(name: str, build: Callable[..., Variant], *, twin: bool = True) -> None:
            made[name] = functools.partial(build, liger=False)
            if twin:
                made[names.with_liger(name)] = functools.partial(build, liger=True)

        if with_eager:
            add(names.EAGER, functools.partial(self.stock, "eager", Batch.padded))
        add(names.SDPA, functools.partial(self.stock, "sdpa", Batch.padded))
        if with_compile:
            add(names.SDPA_COMPILED, self.compiled, twin=False)
        add(names.SDPA_NO_MASK, functools.partial(self.stock, "sdpa", Batch.without_mask))
        add(names.FA4, functools.partial(self.stock, "flash_attention_4", Batch.padded))
        add(names.FA4_BY_HAND, functools.partial(self.stock, "flash_attention_4", Batch.flattened))
        add(names.PADLESS, functools.partial(self.padless, "auto"))
        backend = "torch_varlen" if self.device == "cuda" else "sdpa"
        add(names.PADLESS_TORCH, functools.partial(self.padless, backend), twin=False)
        return made
