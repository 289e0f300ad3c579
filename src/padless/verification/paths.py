"""The ways of patching that `verify` judges, each put in force for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from padless.llama.engage import engage
from padless.llama.handle import Handle
from padless.unpadded.call import DECODING
from padless.unpadded.engagement import patch
from padless.unpadded.handle import PatchHandle
from padless.verification.report import Check, LayerSummary

VerifiedPath = Literal["patch", "sdpa", "flash"]
PATHS: tuple[VerifiedPath, ...] = ("patch", "sdpa", "flash")


@dataclass(frozen=True)
class Served:
    """What a patch has done since it was put in force.

    Attributes:
        layers: the attention layers that it served.
        computed_tokens: query tokens that one layer computed.
        batch_tokens: slots of the same batches, padding included.
        left: calls left to transformers' own path where the patch should have served them.
    """

    layers: tuple[LayerSummary, ...]
    computed_tokens: int
    batch_tokens: int
    left: int


@contextmanager
def engaged(model: nn.Module, path: VerifiedPath) -> Iterator[Callable[[], Served]]:
    """Puts one way of patching in force; yields what tells what it did.

    Args:
        model: the model, unpatched.
        path: "patch" is `padless.patch(model)`, "sdpa" and "flash" are the original's two forwards.
    """
    if path == "patch":
        with patch(model) as handle:
            yield lambda: _of_patch(handle)
    else:
        with engage(path) as engagement:
            yield lambda: _of_original(engagement)


def _of_patch(handle: PatchHandle) -> Served:
    report = handle.report()
    return Served(
        tuple(
            LayerSummary(layer.name, sum(layer.backends.values()), layer.backends, {})
            for layer in report.layers
        ),
        report.computed_tokens,
        report.computed_tokens + report.skipped_tokens,
        # Behind a cache the model decodes as transformers does.
        sum(count for reason, count in report.stock.items() if reason != DECODING),
    )


def _of_original(handle: Handle) -> Served:
    report = handle.report()
    num_layers = max(len(report.layers), 1)
    return Served(
        tuple(
            LayerSummary(layer.name, layer.calls, dict(layer.backends), dict(layer.stock))
            for layer in report.layers
        ),
        report.computed_tokens // num_layers,
        report.batch_tokens // num_layers,
        sum(sum(layer.stock.values()) for layer in report.layers),
    )


def check_layers(report: Served, num_layers: int) -> Check:
    """Judges whether every attention layer was served, each time that it was called."""
    served = sum(1 for layer in report.layers if layer.calls)
    left = report.left
    detail = f"{served} of {num_layers} attention layers went through padless"
    if left:
        detail += f", {left} calls were left to the stock path"
    return Check("layers engaged", served == num_layers and not left, detail)
