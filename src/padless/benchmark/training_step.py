"""A training step of one model, in its variants, all on one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from padless.benchmark.batches import Batch
from padless.benchmark.models import Liger, sharing_copy, trusted_sdpa
from padless.benchmark.variant import Prepare, Variant, WrongNumbersError
from padless.unpadded import patch

# Of the loss, and of the length of a gradient, against the model as it is: bfloat16 rounding gives
# thousandths of the one and hundredths of the other.
_LOSS_TOLERANCE = 0.01
_GRADIENT_TOLERANCE = 0.1

Builder = Callable[[], Variant]


class TrainingStep:
    """Variants of a training step. Each runs on a copy of the model that shares its weights.

    Args:
        model: a LlamaForCausalLM, unpatched; nothing of it changes but the gradients of its
            weights, which are dropped after each step.
        forward_only: whether the step ends with the loss, without autograd.
    """

    def __init__(self, model: nn.Module, *, forward_only: bool = False) -> None:
        self.model = model
        self.forward_only = forward_only
        self.truth: dict[str, float] | None = None

    def stock(
        self, attention: str | None, arguments: Callable[[Batch], Any], *, liger: bool = False
    ) -> Variant:
        """Transformers as it is.

        Args:
            attention: name of its implementation; None is the model's own.
            arguments: makes those of a call.
            liger: whether Liger-Kernel is applied.
        """
        return self._variant(sharing_copy(self.model, attention), arguments, liger=liger)

    def compiled(self, *, liger: bool = False, dynamic: bool | None = None) -> Variant:
        """The model as it is, under torch.compile.

        Args:
            liger: whether Liger-Kernel is applied.
            dynamic: of torch.compile: True makes one graph for all lengths at once.
        """
        variant = self._variant(sharing_copy(self.model), Batch.padded, liger=liger)
        variant.facts["compiled"] = True
        model = torch.compile(sharing_copy(self.model), dynamic=dynamic)
        variant.forward = lambda arguments: (model(**arguments).loss, None)
        return variant

    def padless(self, backend: str = "auto", *, liger: bool = False) -> Variant:
        """A patched model on the padded batch.

        Args:
            backend: of `varlen_attention`.
            liger: whether Liger-Kernel is applied, before the patch.
        """
        model = sharing_copy(self.model)
        variant = self._variant(model, Batch.padded, liger=liger)
        handle = patch(model, backend=backend)
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

        def close() -> None:
            report = handle.report()
            handle.undo()
            kernels = {name for layer in report.layers for name in layer.backends}
            variant.facts["kernel"] = ", ".join(sorted(kernels))
            if report.stock:
                variant.facts["left_to_stock"] = report.stock

        variant.verify, variant.close = verify, close
        return variant

    def find_truth(self, batch: Batch) -> None:
        """Computes what the variants have to compute on a batch, by the model as it is."""
        self.truth = None
        variant = self.stock(None, Batch.padded)
        try:
            with trusted_sdpa(), torch.set_grad_enabled(not self.forward_only):
                loss, _ = variant.forward(variant.prepare(batch))
                if not self.forward_only:
                    loss.backward()
            self.truth = self._figures(loss.detach())
        finally:
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
            is_differentiable=not self.forward_only,
        )

    def _verify(self, inputs: Any, loss: Tensor) -> dict[str, Any]:
        found = self._figures(loss)
        if self.truth is not None:
            bounds = {"loss": _LOSS_TOLERANCE, "gradient_norm": _GRADIENT_TOLERANCE}
            for name, expected in self.truth.items():
                bound = bounds[name]
                if not abs(found[name] - expected) <= bound * abs(expected):
                    raise WrongNumbersError(f"{name} {found[name]:.5g} instead of {expected:.5g}")
        return dict(found)

    def _figures(self, loss: Tensor) -> dict[str, float]:
        figures = {"loss": float(loss)}
        if not self.forward_only:
            # The first weight of the model to have one: behind every layer on the way back.
            gradients = (weight.grad for weight in self._probed() if weight.grad is not None)
            gradient = next(gradients, torch.zeros(()))
            figures["gradient_norm"] = float(torch.linalg.vector_norm(gradient.float()))
        return figures

    def _probed(self) -> list[Tensor]:
        """Lists weights by which gradients are compared: q projections first, then all others."""
        named = list(self.model.named_parameters())
        ordered = sorted(named, key=lambda entry: "q_proj" not in entry[0])
        return [weight for _, weight in ordered]


def widening(build: Builder, columns: int) -> Builder:
    """Makes what builds the same variant on batches with more columns of padding.

    What is kept by shape, such as a plan of cuDNN, then serves no other variant.

    Args:
        build: makes the variant.
        columns: that are added to each batch.
    """

    def widened() -> Variant:
        variant = build()
        prepare = variant.prepare
        variant.prepare = lambda batch: prepare(batch.widened(columns))
        return variant

    return widened
