"""A training step, forward and backward, in all its variants, on one set of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import padless
from benchmarks import names
from padless.benchmark.batches import Batch
from padless.benchmark.models import Liger, Shape, build_llama, sharing_copy, trusted_sdpa
from padless.benchmark.variant import Prepare, Variant, WrongNumbersError

# Of the loss, and of the length of a gradient, against transformers' default: bfloat16 rounding
# gives thousandths of the one and hundredths of the other.
_LOSS_TOLERANCE = 0.01
_GRADIENT_TOLERANCE = 0.1

Builder = Callable[[], Variant]


class TrainingStep:
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
        self.model = build_llama(shape, dtype=dtype, device=device, longest=longest)
        self.truth: dict[str, float] | None = None

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

    def stock(self, attention: str, arguments: Callable[[Batch], Any], *, liger: bool) -> Variant:
        """Transformers as it is.

        Args:
            attention: name of its implementation.
            arguments: makes those of a call.
            liger: whether Liger-Kernel is applied.
        """
        return self._variant(sharing_copy(self.model, attention), arguments, liger=liger)

    def compiled(self, *, liger: bool) -> Variant:
        """Transformers' default under torch.compile."""
        variant = self._variant(sharing_copy(self.model), Batch.padded, liger=liger)
        variant.facts["compiled"] = True
        model = torch.compile(sharing_copy(self.model))
        variant.forward = lambda arguments: (model(**arguments).loss, None)
        return variant

    def padless(self, backend: str, *, liger: bool) -> Variant:
        """A patched model on the padded batch.

        Args:
            backend: of `varlen_attention`.
            liger: whether Liger-Kernel is applied, before the patch.
        """
        model = sharing_copy(self.model)
        variant = self._variant(model, Batch.padded, liger=liger)
        handle = padless.patch(model, backend=backend)
        checked = variant.verify
        assert checked is not None

        def verify(inputs: Any, loss: Tensor) -> dict[str, Any]:
            report = handle.report()
            if report.stock or not report.forwards:
                raise WrongNumbersError(f"left to transformers' own path: {report.stock}")
            kernels = {name for layer in report.layers for name in layer.backends}
            syncs = report.host_syncs / report.forwards
            found = {"kernel": ", ".join(sorted(kernels)), "host_syncs_a_forward": syncs}
            return {**found, **checked(inputs, loss)}

        variant.verify = verify
        return variant

    def find_truth(self, batch: Batch) -> None:
        """Computes what the variants have to compute on a batch, by transformers' default."""
        self.truth = None
        variant = self.stock("sdpa", Batch.padded, liger=False)
        with trusted_sdpa():
            loss, _ = variant.forward(variant.prepare(batch))
            loss.backward()
        self.truth = self._figures(loss.detach())
        for leaf in variant.leaves:
            leaf.grad = None

    def _variant(self, model: Any, arguments: Prepare, *, liger: bool) -> Variant:
        context: Callable[[], Any] = nullcontext
        if liger:
            kernels = Liger()
            kernels.apply(model)
            context = kernels.turn
        return Variant(
            forward=lambda inputs: (model(**inputs).loss, None),
            prepare=arguments,
            leaves=list(self.model.parameters()),
            context=context,
            verify=self._verify,
        )

    def _verify(self, inputs: Any, loss: Tensor) -> dict[str, Any]:
        found = self._figures(loss)
        if self.truth is not None:
            bounds = {"loss": _LOSS_TOLERANCE, "gradient_norm": _GRADIENT_TOLERANCE}
            for name, bound in bounds.items():
                expected = self.truth[name]
                if not abs(found[name] - expected) <= bound * abs(expected):
                    raise WrongNumbersError(f"{name} {found[name]:.5g} instead of {expected:.5g}")
        return dict(found)

    def _figures(self, loss: Tensor) -> dict[str, float]:
        weight = self.model.model.layers[0].self_attn.q_proj.weight
        return {
            "loss": float(loss),
            "gradient_norm": float(torch.linalg.vector_norm(weight.grad.float())),
        }
