"""FlashAttention-2 as torch carries it: the operator below SDPA, called with boundaries.

`torch.nn.attention.varlen` wraps the same operator in Python since torch 2.10, and is called where
the operator is not the one that is known here: from some version on it may prefer cuDNN, which
plans for every length anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from padless.backends.limits import (
    flash2_scratch_overflow,
    in_reach,
    reject_flash2_head_dim,
    reject_flash2_window,
    reject_gpu,
)
from padless.backends.request import AttentionRequest, Window
from padless.backends.rows import CachedRows
from padless.environment import import_optional
from padless.layout import VarlenLayout

NAME = "torch_varlen"
QUICK_TO_LAUNCH = True

_POSITIONAL = (
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
)
# The first version whose lse is `(num_heads, total_q)` by its own word.
_KNOWN_LSE = (2, 10)


def version() -> str:
    """Returns the version of what computes: torch's."""
    return str(torch.__version__)


@functools.cache
def _operator() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """Finds the operator, and the names of its options."""
    if Version(torch.__version__).release < (2, 2):
        # FlashAttention-1: no grouped heads, causal masks aligned top-left.
        return None, frozenset()
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    schema = getattr(getattr(operator, "default", None), "_schema", None)
    arguments = [argument.name for argument in schema.arguments] if schema else []
    if arguments[: len(_POSITIONAL)] != _POSITIONAL:
        return None, frozenset()
    return operator, frozenset(arguments)


def _operator_backward() -> Callable[..., Any]:
    return torch.ops.aten._flash_attention_backward


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """Finds torch's own wrapper, and the names of its arguments."""
    module, _ = import_optional("torch.nn.attention.varlen")
    kernel = getattr(module, "varlen_attn", None)
    names = frozenset(inspect.signature(kernel).parameters) if kernel else frozenset()
    return kernel, names


def reject(request: AttentionRequest) -> str | None:
    """Says why torch's varlen kernel cannot serve the request; None if it can."""
    reason = reject_gpu(request) or reject_flash2_head_dim(request) or reject_flash2_window(request)
    if reason:
        return reason
    operator, options = _operator()
    kernel, names = _kernel()
    if operator is None and kernel is None:
        return f"torch {torch.__version__} has no varlen kernel (2.2 and later have it)"
    if request.window_size != (None, None):
        takes = "window_size_left" in options if operator else "window_size" in names
        if not takes:
            return f"the varlen kernel of torch {torch.__version__} takes no window"
    return None


def _repeats() -> bool:
    """Whether torch is told, for the whole process, to compute gradients that repeat."""
    return torch.are_deterministic_algorithms_enabled() and (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def reject_layout(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why the kernel cannot serve this call; None if it can."""
    if request.deterministic and request.needs_grad and not _repeats():
        # Not in reject(), whose answer is kept: torch can be told otherwise between two calls.
        return "repeats its gradients under torch.use_deterministic_algorithms(True) only"
    return flash2_scratch_overflow(request, layout_q)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> Tensor:
    """Attends within each sequence; see `padless.varlen_attention` for the arguments."""
    q, k, v = (in_reach(x) for x in (q, k, v))
    if _operator()[0] is not None:
        return _call(q, k, v, layout_q, layout_k, causal, softmax_scale, window_size)[0]
    return _call_wrapper(q, k, v, layout_q, layout_k, causal, softmax_scale, window_size)


def reject_decode(request: AttentionRequest) -> str | None:
    """Says why torch's varlen kernel cannot decode; None if it can."""
    if "seqused_k" not in _operator()[1]:
        return f"the varlen operator of torch {torch.__version__} takes no length a row"
    return reject(request)


def decode(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, rows: CachedRows, *, softmax_scale: float
) -> Tensor:
    """Attends from one query a row to the row's own keys; see `sdpa.decode` for the arguments."""
    operator, _ = _operator()
    assert operator is not None  # reject_decode() has said so otherwise
    out: Tensor = operator(
        in_reach(q),
        k_buffer.flatten(0, 1),
        v_buffer.flatten(0, 1),
        rows.cu_seqlens_q,
        rows.cu_seqlens_k,
        1,
        k_buffer.shape[1],
        0.0,
        False,
        False,
        scale=softmax_scale,
        seqused_k=rows.lengths,
    )[0]
    return out


def saves_lse() -> bool:
    """Whether its backward can be called apart from its forward."""
    return _operator()[0] is not None and Version(torch.__version__).release >= _KNOWN_LSE


def varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends as `varlen`; gives the logarithms of the sums too, float32 `(num_heads, total_q)`."""
    q, k, v = (in_reach(x) for x in (q, k, v))
    return _call(q, k, v, layout_q, layout_k, causal, softmax_scale, window_size)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `varlen_with_lse`: dq, dk and dv."""
    q, k, v = (in_reach(x) for x in (q, k, v))
    dq, dk, dv = _operator_backward()(
        dout,
        q,
        k,
        v,
        out,
        lse,
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        _max_seqlen_q(layout_q),
        layout_k.max_seqlen,
        0.0,
        causal,
        # State of a dropout that there is none of.
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
        scale=softmax_scale,
        **_window(window_size),
    )
    return dq, dk, dv


def _max_seqlen_q(layout_q: VarlenLayout) -> int:
    if layout_q.max_seqlen == 1 and layout_q.total < len(layout_q.lengths):
        # At one query each the kernel takes its grouped heads for queries, and fails if a sequence
        # has none. An upper bound keeps it from that and changes no result.
        return 2
    return layout_q.max_seqlen


def _window(window_size: Window) -> dict[str, int | None]:
    left, right = window_size
    if (left, right) == (None, None):
        return {}
    return {"window_size_left": left, "window_size_right": right}


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    causal: bool,
    softmax_scale: float,
    window_size: Window,
) -> tuple[Tensor, Tensor]:
    operator, _ = _operator()
    assert operator is not None
    out, lse, *_ = operator(
        q,
        k,
        v,
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        _max_seqlen_q(layout_q),
        layout_k.max_seqlen,
        0.0,
        causal,
        False,
        scale=softmax_scale,
        **_window(window_size),
    )
    return out, lse


def _call_wrapper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    causal: bool,
    softmax_scale: float,
    window_size: Window,
) -> Tensor:
    kernel, names = _kernel()
    assert kernel is not None  # reject() has said so otherwise
    options: dict[str, Any] = {"scale": softmax_scale}
    left, right = (-1 if bound is None else bound for bound in window_size)
    # The spelling of causal changed from a flag to a window while the kernel was new.
    if "window_size" in names:
        options["window_size"] = (left, 0 if causal else right)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    with _flash_only():
        out: Tensor = kernel(
            q,
            k,
            v,
            layout_q.cu_seqlens,
            layout_k.cu_seqlens,
            _max_seqlen_q(layout_q),
            layout_k.max_seqlen,
            **options,
        )
    return out


def _flash_only() -> Any:
    module, _ = import_optional("torch.nn.attention")
    if module is None:
        return nullcontext()
    return module.sdpa_kernel([module.SDPBackend.FLASH_ATTENTION])
