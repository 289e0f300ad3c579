"""FlashAttention-4: `flash_attn.cute` of the package flash-attn-4, for Hopper and Blackwell."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from padless.backends.limits import in_reach, reject_gpu, reject_head_dim, token_overflow
from padless.backends.request import AttentionRequest, Window
from padless.backends.rows import CachedRows
from padless.environment import import_optional, package_version
from padless.layout import VarlenLayout

NAME = "fa4"
# Its launches are Python: 0.15 ms forward and 0.2 ms backward on the host of an H100.
SLOW_TO_LAUNCH = True

_MODULE = "flash_attn.cute.interface"
_NEEDED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_NEEDED_BACK = (*_NEEDED, "dout", "lse", "causal", "window_size_left", "window_size_right")
# Before it, gradients of grouped heads did not repeat.
_DETERMINISTIC = Version("4.0.0b12")
# A kernel is compiled for lengths that fit one tile of 64 to 128 rows, and another for the rest:
# seconds, in the middle of a run. A larger bound changes no result and avoids the first.
_LEAST_BOUND = 512


@functools.cache
def _package() -> tuple[ModuleType | None, str]:
    # Not `flash_attn`: this package has no `__init__` there, and that of FlashAttention-2 has.
    return import_optional(_MODULE)


@functools.cache
def _kernel() -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    """Finds the kernel, the names of its arguments, and the reason if there is none."""
    return _find("flash_attn_varlen_func", (*_NEEDED, "causal"))


@functools.cache
def _backward() -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    return _find("_flash_attn_bwd", _NEEDED_BACK)


def _find(
    function: str, needed: tuple[str, ...]
) -> tuple[Callable[..., Any] | None, frozenset[str], str]:
    module, reason = _package()
    if module is None:
        return None, frozenset(), reason
    kernel = getattr(module, function, None)
    if kernel is None:
        return None, frozenset(), f"{_MODULE} has no {function}"
    names = frozenset(inspect.signature(kernel).parameters)
    missing = [name for name in needed if name not in names]
    if missing:
        return None, names, f"{function} of flash-attn-4 {version()} takes no {missing[0]}"
    return kernel, names, ""


@functools.cache
def version() -> str:
    """Returns the version of the distribution flash-attn-4."""
    # The module's own `__version__` asks for another distribution, and says 0.0.0.
    return str(package_version("flash-attn-4") or "unknown")


def reject(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-4 cannot serve the request; None if it can."""
    reason = reject_gpu(request, major=(9, 10)) or reject_head_dim(request)
    if reason:
        return reason
    blackwell = torch.cuda.get_device_capability(request.device)[0] == 10
    if blackwell and 128 < request.head_dim != 256:
        return f"needs head_dim up to 128, or 256, on Blackwell, got {request.head_dim}"
    kernel, names, reason = _kernel()
    if kernel is None:
        return reason
    if request.window_size != (None, None) and "window_size" not in names:
        return f"flash-attn-4 {version()} takes no window"
    if request.deterministic and request.needs_grad:
        return _reject_deterministic(names)
    return None


def _reject_deterministic(names: frozenset[str]) -> str | None:
    installed = package_version("flash-attn-4")
    if "deterministic" in names and installed is not None and installed >= _DETERMINISTIC:
        return None
    return f"flash-attn-4 {version()} does not repeat its gradients, {_DETERMINISTIC} does"


def reject_layout(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why the kernel cannot serve a batch of this size; None if it can."""
    return token_overflow(request, layout_q, layout_k)


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
    options = _options(layout_q, layout_k, causal, softmax_scale, window_size, deterministic)
    result = _call(q, k, v, options)
    out: Tensor = result[0] if isinstance(result, tuple) else result
    if out.requires_grad:
        # flash-attention issue 2611: versions before its end go astray in a dout whose rows lie far
        # apart, as those of a slice do.
        out.register_hook(in_reach)
    return out


def reject_decode(request: AttentionRequest) -> str | None:
    """Says why FlashAttention-4 cannot decode; None if it can."""
    reason = reject(request)
    if reason is None and "seqused_k" not in _kernel()[1]:
        return f"flash-attn-4 {version()} takes no length a row"
    return reason


def decode(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, rows: CachedRows, *, softmax_scale: float
) -> Tensor:
    """Attends from one query a row to the row's own keys; see `sdpa.decode` for the arguments."""
    options = {
        "cu_seqlens_q": rows.cu_seqlens_q,
        "cu_seqlens_k": rows.cu_seqlens_k,
        "max_seqlen_q": 1,
        "max_seqlen_k": max(k_buffer.shape[1], _LEAST_BOUND),
        "seqused_k": rows.lengths,
        "softmax_scale": softmax_scale,
        "causal": False,
    }
    result = _call(q, k_buffer.flatten(0, 1), v_buffer.flatten(0, 1), options)
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def saves_lse() -> bool:
    """Whether its backward can be called apart from its forward."""
    return "return_lse" in _kernel()[1] and _backward()[0] is not None


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
    options = _options(layout_q, layout_k, causal, softmax_scale, window_size, deterministic)
    out, lse = _call(q, k, v, {**options, "return_lse": True})
    return out, lse


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
    kernel, names, _ = _backward()
    assert kernel is not None  # saves_lse() has said so otherwise
    options = _options(layout_q, layout_k, causal, softmax_scale, window_size, deterministic)
    options["window_size_left"], options["window_size_right"] = options.pop("window_size")
    if "deterministic" not in names:
        options.pop("deterministic", None)
    tensors = [in_reach(x) for x in (q, k, v, out)]
    with torch.cuda.device_of(q):
        dq, dk, dv = kernel(*tensors, dout=in_reach(dout), lse=lse, **options)[:3]
    return dq, dk, dv


def _options(
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    causal: bool,
    softmax_scale: float,
    window_size: Window,
    deterministic: bool,
) -> dict[str, Any]:
    return {
        "cu_seqlens_q": layout_q.cu_seqlens,
        "cu_seqlens_k": layout_k.cu_seqlens,
        "max_seqlen_q": _bound(layout_q),
        "max_seqlen_k": _bound(layout_k),
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (window_size[0], 0 if causal else window_size[1]),
        "deterministic": deterministic,
    }


def _bound(layout: VarlenLayout) -> int:
    # One token each is decoding, which has a kernel of its own on Blackwell, and does not alternate
    # with the rest.
    return layout.max_seqlen if layout.max_seqlen == 1 else max(layout.max_seqlen, _LEAST_BOUND)


def _call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
    kernel, names, _ = _kernel()
    assert kernel is not None  # reject() has said so otherwise
    # What a version does not know is at its default, or reject() has said so.
    options = {name: value for name, value in options.items() if name in names}
    with torch.cuda.device_of(q):
        return kernel(*(in_reach(x) for x in (q, k, v)), **options)
