"""Running a model for `verify` without leaving a trace in it, and judging the numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padless.errors import UnsupportedError
from padless.verification.batch import PaddedBatch
from padless.verification.report import Check

# Relative; 64 roundings of float32. torch's fused attention on the CPU has backward errors up to
# four times those of eager attention, which is what transformers before 4.36 runs (SmolLM2-135M,
# torch 2.13, 2026-11). A scale off by 1 % is a thousand times above this.
_FLOOR = 64 * torch.finfo(torch.float32).eps


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Finds the LLaMA attention layers of a model.

    Raises:
        UnsupportedError: there is none.
    """
    from padless.hf.call import modeling_llama

    layers = [m for m in model.modules() if isinstance(m, modeling_llama().LlamaAttention)]
    if not layers:
        raise UnsupportedError(
            f"model must be a LLaMA (hold LlamaAttention layers), got {type(model).__name__} "
            f"without any"
        )
    return layers


def vocab_size(model: nn.Module) -> int:
    """Reads how many ids a model's embedding knows."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def attention_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Finds the floating parameters of the attention layers, by name.

    Raises:
        UnsupportedError: weights are quantised or not there (meta device).
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.is_meta:
            raise UnsupportedError(
                f"verify needs floating weights in memory, got {name} of {weight.dtype} on "
                f"{weight.device}"
            )
    return {
        f"{i}.{name}": weight
        for i, layer in enumerate(attention_layers(model))
        for name, weight in layer.named_parameters()
    }


def truth_copy(model: nn.Module) -> tuple[nn.Module, torch.dtype]:
    """Copies a model in the precision that is the truth for it: float64, or float32 for halves."""
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else torch.float64
    return copy.deepcopy(model).to(dtype), dtype


class _SoftmaxInDouble(TorchFunctionMode):
    """Computes the softmax of float64 scores in float64.

    Eager attention asks for float32 there, which the truth must not share with what is judged by
    it; and the lowest float64, which hides a key, is -inf in float32: a row of it alone is NaN.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_softmax = func in (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)
        if is_softmax and args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


@contextmanager
def as_truth(dtype: torch.dtype) -> Iterator[None]:
    """Lets a model of this dtype compute in it throughout.

    transformers before 4.38 fills its masks with the lowest number of the model's dtype in a tensor
    of the default one: float64's does not fit into float32.
    """
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _SoftmaxInDouble():
            yield
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Gives the model back as it was: mode, gradients, requires_grad, dropout; and the RNG."""
    modes = [(m, m.training) for m in model.modules()]
    weights = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    dropouts: list[tuple[Any, str, Any]] = [
        (m, "p", m.p) for m in model.modules() if isinstance(m, nn.Dropout)
    ]
    dropouts += [
        (m, "attention_dropout", m.attention_dropout)
        for m in model.modules()
        if hasattr(m, "attention_dropout")
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            for owner, name, _ in dropouts:
                setattr(owner, name, 0.0)
            yield
    finally:
        for owner, name, value in dropouts:
            setattr(owner, name, value)
        for weight, requires_grad, grad in weights:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for module, mode in modes:
            module.training = mode


def forward(model: nn.Module, batch: PaddedBatch, **options: Any) -> Any:
    """Runs a causal LM on a padded batch, positions counted from the first real token."""
    return model(
        input_ids=batch.ids,
        attention_mask=batch.mask_for(next(model.parameters()).dtype),
        position_ids=batch.position_ids,
        use_cache=False,
        return_dict=True,
        **options,
    )


@torch.no_grad()
def real_logits(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Computes the logits of real tokens in evaluation, `(real_tokens, vocab_size)`."""
    logits: Tensor = forward(model.eval(), batch).logits
    return logits[batch.real]


def training_step(model: nn.Module, batch: PaddedBatch) -> dict[str, Tensor]:
    """Runs forward and backward in training mode; returns the attention weights' gradients."""
    weights = attention_weights(model)
    model.train().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    forward(model, batch, labels=batch.labels).loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return gradients


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Times one run in milliseconds of wall time, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


class Baseline(NamedTuple):
    """The unpatched model's own error in one tensor: root mean square, and largest."""

    rms: float
    largest: float

    @classmethod
    def of(cls, runs: Iterable[tuple[Tensor, Tensor]]) -> Baseline:
        """Finds the larger error of runs that compute the same in another layout.

        Args:
            runs: (stock, truth) of each. Which kernels a product takes, and in which order it adds,
                depends on where padding stands: one run alone may have rounded luckily.
        """
        errors = [stock.double() - truth.double() for stock, truth in runs]
        return cls(max(map(_rms, errors)), max(map(_max, errors)))


def judge(name: str, tensors: Mapping[str, tuple[Tensor, Tensor, Baseline]]) -> Check:
    """Judges tensors by error budget: RMS at most twice, maximum three times the stock model's.

    Args:
        name: of the check.
        tensors: by name, (patched, truth, the stock model's error); the worst of them decides.

    Note:
        Every tensor has its own budget. A fault in one layer would drown in a common one. What
        half precision adds is in the unpatched error, so that the floor is float32's for all.
    """
    checks = []
    for tensor, (got, truth, baseline) in tensors.items():
        truth = truth.double()
        error, stock_rms = got.double() - truth, baseline.rms
        rms = _rms(error)
        rms_budget = 2.0 * stock_rms + _FLOOR * _rms(truth)
        largest, max_budget = _max(error), 3.0 * baseline.largest + _FLOOR * _max(truth)
        passed = rms <= rms_budget and largest <= max_budget  # False for NaN too
        checks.append(
            Check(
                name=name,
                passed=passed,
                tensor=tensor,
                detail=f"{tensor}: RMS error {rms:.2e} (unpatched {stock_rms:.2e}, "
                f"allowed {rms_budget:.2e}), largest {largest:.2e} (allowed {max_budget:.2e})",
                rms_error=rms,
                rms_budget=rms_budget,
                max_error=largest,
                max_budget=max_budget,
                stock_rms_error=stock_rms,
            )
        )
    return max(checks, key=_excess)


def _excess(check: Check) -> float:
    ratios = [
        error / budget if error == error else float("inf")
        for error, budget in (
            (check.rms_error, check.rms_budget),
            (check.max_error, check.max_budget),
        )
        if error is not None and budget
    ]
    return max(ratios, default=float("inf"))


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def _max(x: Tensor) -> float:
    return float(x.abs().max())


def device_name(device: torch.device) -> str:
    """Names a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
