"""Running a model for `verify` without leaving a trace in it, and judging the numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from padless.errors import UnsupportedError
from padless.verification.batch import PaddedBatch
from padless.verification.report import Check


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
        attention_mask=batch.real.long(),
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


def judge(name: str, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Check:
    """Judges tensors by error budget: RMS at most twice, maximum three times the stock model's.

    Args:
        name: of the check.
        pairs: (patched, stock, truth) tensors; the worst of them decides.

    Note:
        Every tensor has its own budget. A fault in one layer would drown in a common one. The
        floor is a few roundings of float32; what half precision adds is in the unpatched error.
    """
    eps = torch.finfo(torch.float32).eps
    checks = []
    for got, stock, truth in pairs:
        truth = truth.double()
        error, baseline = got.double() - truth, stock.double() - truth
        rms, stock_rms = _rms(error), _rms(baseline)
        rms_budget = 2.0 * stock_rms + 4 * eps * _rms(truth)
        largest, max_budget = _max(error), 3.0 * _max(baseline) + 4 * eps * _max(truth)
        passed = rms <= rms_budget and largest <= max_budget  # False for NaN too
        checks.append(
            Check(
                name=name,
                passed=passed,
                detail=f"RMS error {rms:.2e} (unpatched {stock_rms:.2e}, "
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
