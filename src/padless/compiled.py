"""`varlen_attention` under torch.compile: one operator, opaque to the compiler.

Compiled code may read tensors and constants only: to read the lengths of a layout there would mean
to compile anew for each set of them. The operator takes the boundaries as tensors, and reads the
lengths from their copy on the host when it runs, without waiting for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from padless import dispatch
from padless.backends.request import AttentionRequest, Window
from padless.layout import VarlenLayout

# Without the guard a backward pass could not be recorded inside an operator. Before torch 2.4 calls
# break the graph instead.
SUPPORTED = hasattr(torch.library, "custom_op") and hasattr(torch._C, "_ForceDispatchKeyGuard")

_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor host_q, Tensor host_k, bool causal, "
    "float softmax_scale, int left, int right, bool deterministic, bool needs_grad, str backend"
)


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
    """Puts the call into the graph that is being traced; see `padless.varlen_attention`."""
    if not SUPPORTED:
        return _attend_eagerly(
            q,
            k,
            v,
            layout_q,
            layout_k,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            deterministic=deterministic,
            backend=backend,
        )
    left, right = window_size
    out: Tensor = torch.ops.padless.varlen_attention(
        q,
        k,
        v,
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        layout_q.host_cu_seqlens,
        layout_k.host_cu_seqlens,
        causal,
        softmax_scale,
        -1 if left is None else left,
        -1 if right is None else right,
        deterministic,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        backend,
    )[0]
    return out


@dataclass(frozen=True)
class _Call:
    """The arguments of the operator, read back."""

    layout_q: VarlenLayout
    layout_k: VarlenLayout
    options: dict[str, Any]
    needs_grad: bool
    backend: str

    @classmethod
    def of(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        host_q: Tensor,
        host_k: Tensor,
        causal: bool,
        softmax_scale: float,
        left: int,
        right: int,
        deterministic: bool,
        needs_grad: bool,
        backend: str,
    ) -> _Call:
        window_size = (None if left < 0 else left, None if right < 0 else right)
        options = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "window_size": window_size,
            "deterministic": deterministic,
        }
        layout_q = layout_k = _read_layout(cu_seqlens_q, host_q)
        if cu_seqlens_k is not cu_seqlens_q:
            layout_k = _read_layout(cu_seqlens_k, host_k)
        return cls(layout_q, layout_k, options, needs_grad, backend)

    def plan(self, q: Tensor, k: Tensor) -> dispatch.Plan | None:
        """Plans the call as an eager one is; None if there is no query or no key at all."""
        dispatch.validate_layouts(q, k, self.layout_q, self.layout_k)
        if self.layout_q.total == 0 or self.layout_k.total == 0:
            return None
        asked = {name: self.options[name] for name in ("causal", "window_size", "deterministic")}
        # Below autograd no tensor asks for a gradient: whether one will be, the graph has said.
        request = replace(AttentionRequest.of(q, k, **asked), needs_grad=self.needs_grad)
        return dispatch.plan_call(request, self.backend, self.layout_q, self.layout_k)


def _read_layout(cu_seqlens: Tensor, host: Tensor) -> VarlenLayout:
    # All layers of a step share the tensor: its lengths are read once and kept on it.
    lengths = getattr(host, "_padless_lengths", None)
    if lengths is None:
        lengths = tuple(b - a for a, b in pairwise(host.tolist()))
        host._padless_lengths = lengths  # type: ignore[attr-defined]
    return VarlenLayout(lengths, cu_seqlens, None, 1, sum(lengths))


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call.of(*arguments)
    plan = call.plan(q, k)
    lse = None
    with dispatch.no_autocast(q):
        if plan is None:
            out = torch.zeros_like(q)
        elif dispatch.saves_lse(plan):
            out, lse = dispatch.run_with_lse(plan, q, k, v, call.options)
        else:
            out = dispatch.run(plan, q, k, v, **call.options)
    if lse is None:
        # Not read, but torch compares what an operator gives with what it gave.
        lse = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    return out.contiguous(), lse.contiguous()


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(*arguments)
    plan = call.plan(q, k)
    with dispatch.no_autocast(q):
        if plan is None:
            grads = tuple(torch.zeros_like(x) for x in (q, k, v))
        elif dispatch.saves_lse(plan):
            grads = dispatch.gradients(plan, (dout, q, k, v, out), lse, call.options)
        else:
            grads = _recompute(plan, dout, (q, k, v), call.options)
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def _recompute(
    plan: dispatch.Plan,
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Runs the forward again, recorded, and goes back through it."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    # Inside an operator autograd is switched off, whatever enable_grad says: switch it on again.
    for key in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dispatch.run(plan, *leaves, **options)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return tuple(
        torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, grads, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *arguments = inputs
    tensors, ctx.rest = arguments[:4], arguments[4:]
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _go_back(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *boundaries = ctx.saved_tensors
    grads = torch.ops.padless.varlen_attention_backward(
        dout, q, k, v, out, lse, *boundaries, *ctx.rest
    )
    return (*grads, *[None] * (len(boundaries) + len(ctx.rest)))


def _empty(*likes: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in likes)


def _register() -> None:
    """Makes the operators known to torch, once."""
    forward = torch.library.custom_op(
        "padless::varlen_attention",
        _forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    )
    forward.register_fake(
        lambda q, k, v, *_: (*_empty(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
    )
    forward.register_autograd(_go_back, setup_context=_save)
    backward = torch.library.custom_op(
        "padless::varlen_attention_backward",
        _backward,
        mutates_args=(),
        schema=(
            f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) "
            f"-> (Tensor, Tensor, Tensor)"
        ),
    )
    backward.register_fake(lambda dout, q, k, v, *_: _empty(q, k, v))


if SUPPORTED:
    _register()
else:
    _attend_eagerly = torch._dynamo.disable(dispatch.attend)
