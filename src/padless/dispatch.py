"""Serves a call: by which backend, in how many pieces, with heads of which size.

Knows adapters by name only. What a user may ask, and its checks, are in `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.answers import Selection
from padless.backends.request import AttentionRequest, Window
from padless.environment import autocasts
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout
from padless.selection import adapter, select_backend
from padless.workload import has_little_work

Layouts = tuple[VarlenLayout, VarlenLayout]


@dataclass(frozen=True)
class Plan:
    """How a call is served.

    Attributes:
        backend: the adapter that computes.
        head_dim: what q, k and v are padded to before it does.
        pieces: layouts of q and of k for each call of the adapter, in order.
        selection: the backend's name, with the reasons why others were passed over.
    """

    backend: ModuleType
    head_dim: int
    pieces: tuple[Layouts, ...]
    selection: Selection


def plan_call(
    request: AttentionRequest,
    backend: str,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    needs_lse: bool = False,
) -> Plan:
    """Chooses the backend, and cuts the batch where it is too large for the backend's indices.

    Args:
        request: what is asked.
        backend: "auto", or the name of one.
        layout_q: of the queries.
        layout_k: of the keys.
        needs_lse: whether only a backend will do that `run_with_lse` can call.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the named backend, or every one, rejects the request or the layout.
    """
    passed_over: dict[str, str] = {}
    little = has_little_work(request, layout_q, layout_k)
    while True:
        selection = select_backend(request, backend, passing_over=passed_over, little_work=little)
        chosen = adapter(selection.name)
        asked = request
        if selection.head_dim != request.head_dim:
            asked = replace(request, head_dim=selection.head_dim)
        pieces, reason = _cut(chosen, asked, (layout_q, layout_k))
        plan = Plan(chosen, selection.head_dim, pieces, selection)
        if not reason and needs_lse:
            reason = reject_lse(plan, asked) or ""
        if not reason:
            return plan
        if backend != "auto":
            raise BackendUnavailableError(f"no backend can serve {request}: {backend}: {reason}")
        passed_over[selection.name] = reason


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window,
    deterministic: bool,
    backend: str,
) -> Tensor:
    """Attends within each sequence; see `padless.varlen_attention` for the arguments."""
    validate_layouts(q, k, layout_q, layout_k)
    if layout_q.total == 0 or layout_k.total == 0:
        return _no_keys(q, k, v)
    request = AttentionRequest.of(
        q, k, v, causal=causal, window_size=window_size, deterministic=deterministic
    )
    plan = plan_call(request, backend, layout_q, layout_k)
    with no_autocast(q):
        return run(
            plan,
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            deterministic=deterministic,
        )


def validate_layouts(q: Tensor, k: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout) -> None:
    """Checks that the layouts are those of the tensors.

    Raises:
        ValueError: they are not.
    """
    for name, tensor, layout in (("q", q, layout_q), ("k", k, layout_k)):
        if tensor.shape[0] != layout.total:
            raise ValueError(
                f"{name} must hold the {layout.total} tokens of its layout, got {tensor.shape[0]}"
            )
        if layout.cu_seqlens.device != q.device:
            raise ValueError(
                f"cu_seqlens must be on q's device {q.device}, got {layout.cu_seqlens.device}"
            )
    if len(layout_q.lengths) != len(layout_k.lengths):
        raise ValueError(
            f"layout and layout_k must hold the same number of sequences, "
            f"got {len(layout_q.lengths)} and {len(layout_k.lengths)}"
        )


def run(plan: Plan, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Calls the plan's adapter for each of its pieces."""
    head_dim = q.shape[-1]
    q, k, v = (pad_heads(x, plan.head_dim) for x in (q, k, v))
    if len(plan.pieces) == 1:
        out: Tensor = plan.backend.varlen(q, k, v, *plan.pieces[0], **options)
    else:
        parts = []
        for layouts, q_i, k_i, v_i in _parts(plan.pieces, q, k, v):
            if layouts[0].total and layouts[1].total:
                parts.append(plan.backend.varlen(q_i, k_i, v_i, *layouts, **options))
            else:
                parts.append(_no_keys(q_i, k_i, v_i))
        out = torch.cat(parts)
    return out if head_dim == plan.head_dim else out[..., :head_dim]


def saves_lse(plan: Plan) -> bool:
    """Whether the backend's own backward can be called with what its forward left behind."""
    ask: Callable[[], bool] | None = getattr(plan.backend, "saves_lse", None)
    return ask is not None and len(plan.pieces) == 1 and ask()


def reject_lse(plan: Plan, request: AttentionRequest) -> str | None:
    """Says why `run_with_lse` and `gradients` cannot be called; None if they can."""
    is_kernel = hasattr(plan.backend, "saves_lse")
    has_both = hasattr(plan.backend, "varlen_with_lse") and len(plan.pieces) == 1
    if not (saves_lse(plan) if is_kernel else has_both):
        return "gives no logarithms of its sums in one call"
    ask: Callable[..., str | None] | None = getattr(plan.backend, "reject_lse", None)
    reason = None if ask is None else ask(request, *plan.pieces[0])
    return f"logarithms of its sums: {reason}" if reason else None


def run_with_lse(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attends by a plan made for it; gives the natural logarithms of the sums too.

    Returns:
        `(total_q, num_heads, head_dim)`, and float32 or float64 `(num_heads, total_q)`.
    """
    padded = (pad_heads(x, plan.head_dim) for x in (q, k, v))
    out, lse = plan.backend.varlen_with_lse(*padded, *plan.pieces[0], **options)
    return out if q.shape[-1] == plan.head_dim else out[..., : q.shape[-1]], lse


def gradients(
    plan: Plan, tensors: tuple[Tensor, ...], lse: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Goes back through `run_with_lse`.

    Args:
        plan: of the forward.
        tensors: dout, q, k, v and out.
        lse: of the forward. Both out and lse may be those of more keys than these, and the result
            is these keys' share of the gradients then.
        options: of the forward.

    Returns:
        dq, dk and dv.
    """
    head_dim = tensors[0].shape[-1]
    dout, q, k, v, out = (pad_heads(x, plan.head_dim) for x in tensors)
    grads = plan.backend.gradients(dout, q, k, v, out, lse, *plan.pieces[0], **options)
    return tuple(grads if head_dim == plan.head_dim else (x[..., :head_dim] for x in grads))


def pad_heads(x: Tensor, head_dim: int) -> Tensor:
    """Fills heads up with zeros, which change no score and add only columns that are dropped."""
    return x if x.shape[-1] == head_dim else F.pad(x, (0, head_dim - x.shape[-1]))


def no_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from computing in another dtype than the tensors have."""
    return torch.autocast(q.device.type, enabled=False) if autocasts(q) else nullcontext()


def _no_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Answers queries that see no key: zeros that are still a function of all three."""
    zeros = q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    return zeros + (k[:0].sum() + v[:0].sum())


def _cut(
    chosen: ModuleType, request: AttentionRequest, layouts: Layouts
) -> tuple[tuple[Layouts, ...], str]:
    """Halves the batch by its sequences until the backend takes each piece.

    Returns:
        The pieces and an empty string; or none and the reason, if it is in a single sequence.
    """
    ask = getattr(chosen, "reject_layout", None)
    reason = ask(request, *layouts) if ask else None
    if not reason:
        return (layouts,), ""
    n = len(layouts[0].lengths)
    if n == 1:
        return (), reason
    pieces: tuple[Layouts, ...] = ()
    for first, last in ((0, n // 2), (n // 2, n)):
        part = (layouts[0].narrow(first, last), layouts[1].narrow(first, last))
        more, reason = _cut(chosen, request, part)
        if reason:
            return (), reason
        pieces += more
    return pieces, ""


def _parts(
    pieces: tuple[Layouts, ...], q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[Layouts, Tensor, Tensor, Tensor]]:
    totals_q = [layout_q.total for layout_q, _ in pieces]
    totals_k = [layout_k.total for _, layout_k in pieces]
    yield from zip(pieces, q.split(totals_q), k.split(totals_k), v.split(totals_k), strict=True)
