"""What `verify` found, as data; how to print it is the command line's affair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was compared.
        passed: the answer.
        detail: one line for people.
        rms_error: of the patched model against the truth, where numbers were compared.
        rms_budget: what it may be: twice the unpatched model's own, plus roundings.
        max_error: the largest error.
        max_budget: three times the unpatched model's own, plus roundings.
        stock_rms_error: the unpatched model's own, in the same dtype.
        tensor: the one that decided, where numbers were compared: the one nearest to its budget or
            furthest above it. Gradients are named by layer, "28.v_proj.weight".
    """

    name: str
    passed: bool
    detail: str
    rms_error: float | None = None
    rms_budget: float | None = None
    max_error: float | None = None
    max_budget: float | None = None
    stock_rms_error: float | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class StepTime:
    """Forward and backward of one batch, medians of interleaved runs in one process."""

    stock_ms: float
    patched_ms: float


@dataclass(frozen=True)
class LayerSummary:
    """One attention layer: its name, calls, and calls by backend."""

    name: str
    calls: int
    backends: dict[str, int]
    stock: dict[str, int]


@dataclass(frozen=True)
class PathReport:
    """One way of patching.

    Attributes:
        path: "patch" (`padless.patch`), "sdpa" (`forward_2`) or "flash" (`forward`).
        checks: every check.
        layers: the layers that were called.
        computed_tokens: query tokens that one layer computes in a training step.
        batch_tokens: the same batch's slots, padding included.
        step: time of a training step.
    """

    path: str
    checks: tuple[Check, ...]
    layers: tuple[LayerSummary, ...]
    computed_tokens: int
    batch_tokens: int
    step: StepTime

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that served, in alphabetical order."""
        return tuple(sorted({name for layer in self.layers for name in layer.backends}))


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on a model.

    Attributes:
        model: class and name or path.
        dtype: of its weights.
        truth_dtype: of the model that it was compared with.
        device: where it ran.
        versions: of padless, torch, transformers and Python.
        batch: rows.
        seqlen: columns of the padded batch.
        real_tokens: tokens that are not padding.
        num_layers: attention layers of the model.
        paths: one report per path.
        seconds: wall time in all.
    """

    model: str
    dtype: str
    truth_dtype: str
    device: str
    versions: dict[str, str]
    batch: int
    seqlen: int
    real_tokens: int
    num_layers: int
    paths: tuple[PathReport, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the patched model is the same model on every path."""
        return all(path.passed for path in self.paths)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything in types that JSON knows."""
        data = asdict(self)
        data["passed"] = self.passed
        for entry, path in zip(data["paths"], self.paths, strict=True):
            entry["passed"] = path.passed
        return data
