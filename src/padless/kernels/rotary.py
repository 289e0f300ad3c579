"""`apply_rotary`: Hugging Face's rotary embedding of packed q and k, in place where that is safe.

Owns the choice of what rotates, and all that autograd has to know. The arithmetic is in
`rotary_triton`, and for the CPU in `rotary_torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padless.environment import is_compiling
from padless.kernels import rotary_torch
from padless.kernels.trial import faults_by


class RotaryBackend(NamedTuple):
    """What rotates: "triton" or "torch", and why it is not Triton's kernel (None if it is)."""

    name: str
    reason: str | None


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Rotates packed queries and keys by the tables that transformers hands to its layers.

    With 1 and 2 for the halves of the last dimension, for q and k alike:

        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2

    Args:
        q: `(total, num_heads, head_dim)`, floating, head_dim even, any strides.
        k: `(total, num_kv_heads, head_dim)`, dtype and device of q; shares no memory with q.
        cos: `(total, head_dim)` or `(1, total, head_dim)`, floating, on q's device. The halves need
            not be equal.
        sin: shape of cos.
        inplace: whether q and k may be written over, after which they hold nothing of use. They are
            unless autograd would copy for it (a slice, a leaf that requires grad), the last
            dimension is not contiguous, or a compiler traces: then the results are new tensors.

    Returns:
        Rotated q and k in q's dtype, computed in float32 (float64 from float64) and rounded once.

    Raises:
        TypeError: an argument is not floating, or k has another dtype than q.
        ValueError: shapes or devices do not fit each other, or head_dim is odd.

    Note:
        Differentiable any number of times, in cos and sin too. Does not wait for the GPU, except
        where the first call of a process tries the kernel. As with torch's own in-place operations,
        what had saved q or k for its backward raises there.
    """
    _validate(q, k, cos, sin)
    if cos.dim() == 3:
        cos, sin = cos[0], sin[0]
    # Compilers fuse the expression themselves; tracers and subclasses (sharded, fake) need to see
    # torch's own operations, and so does autograd where the tables are learnt.
    plain = not _is_traced() and type(q) is Tensor and type(k) is Tensor
    if not plain or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return rotary_torch.rotated(q, cos, sin), rotary_torch.rotated(k, cos, sin)
    rotate = _rotate_of(rotary_backend(q).name)
    cos, sin = _rows_contiguous(cos), _rows_contiguous(sin)
    written = _writable(q, k) if inplace else None
    if not _needs_graph(q, k):
        return _rotate_untracked(q, k, cos, sin, rotate, inplace=written is not None)
    call = _Call(rotate, q.shape[1], k.shape[1], inplace=written is not None, transposed=False)
    out_q, out_k = _Rotary.apply(*(written or (q, k)), cos, sin, call)
    return out_q.view(q.shape), out_k.view(k.shape)


def rotary_backend(q: Tensor) -> RotaryBackend:
    """Says what rotates q and the k beside it; tries the kernel once for each GPU."""
    reason = _reject_triton(q)
    return RotaryBackend("triton" if reason is None else "torch", reason)


def _reject_triton(q: Tensor) -> str | None:
    if _is_traced():
        return "a compiler or tracer needs to see torch's own operations"
    if q.device.type != "cuda":
        return f"needs CUDA, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {q.dtype}"
    return _triton_fault(q.device)


def _is_traced() -> bool:
    return is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _try(device: torch.device) -> None:
    """Rotates a few numbers by the kernel; raises if that is wrong."""
    numbers = torch.linspace(-1, 1, 144, dtype=torch.float32, device=device)
    q, k = numbers[:96].view(2, 3, 2, 8)
    cos, sin = numbers[96:].view(2, 3, 8)
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    _rotate_of("triton")(q, k, out_q, out_k, cos, sin, transposed=False)
    for out, x in ((out_q, q), (out_k, k)):
        torch.testing.assert_close(out, rotary_torch.rotated(x, cos, sin))


_triton_fault = faults_by(_try)


def _rotate_of(backend: str) -> Callable[..., None]:
    if backend == "torch":
        return rotary_torch.rotate
    from padless.kernels import rotary_triton  # imports Triton

    return rotary_triton.rotate


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _writable(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """Finds the tensors that autograd may see written in place of q and k; None if there are none.

    Autograd records a write to a view as CopySlices on its base, whose backward clones the gradient
    of all the base, and refuses a function that writes to two views. What the projections hand over
    are views as a rule. Where such a view is the whole of its base the base is written, and viewed
    again afterwards: the backward then sees a reshape, which costs nothing.
    """
    for x in (q, k):
        # An expanded tensor would rotate the same number once for each of its places.
        expanded = any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))
        frozen = x.is_inference() and not torch.is_inference_mode_enabled()
        if x.stride(-1) != 1 or expanded or frozen:
            return None
    if q.data_ptr() == k.data_ptr():
        return None
    if not _needs_graph(q, k):
        return q, k
    bases = []
    for x in (q, k):
        base = x._base if x._is_view() else x
        assert base is not None
        is_whole = x.numel() == base.numel() and x.is_contiguous() and base.is_contiguous()
        # Torch lets nobody write to a leaf that requires grad. A view taken under no_grad, or made
        # to require grad by itself, is a leaf too: it is cut off from the graph of its base.
        is_leaf = x.requires_grad and (x.is_leaf or base.is_leaf)
        if not is_whole or is_leaf:
            return None
        bases.append(base)
    return bases[0], bases[1]


def _needs_graph(q: Tensor, k: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)


def _rotate_untracked(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotate: Callable[..., None], *, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Rotates where autograd records nothing, for a third of the price in Python."""
    if inplace:
        rotate(q, k, q, k, cos, sin, transposed=False)
        if rotate is not rotary_torch.rotate:
            # Autograd does not see what Triton writes. A write of nothing counts as one, so that
            # whoever has saved q or k notices.
            q[:0].zero_()
            k[:0].zero_()
        return q, k
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    rotate(_rows_contiguous(q), _rows_contiguous(k), out_q, out_k, cos, sin, transposed=False)
    return out_q, out_k


class _Call(NamedTuple):
    rotate: Callable[..., None]
    num_heads: int
    num_kv_heads: int
    inplace: bool
    transposed: bool


def _rotated(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, call: _Call
) -> tuple[Tensor | None, Tensor | None]:
    total, head_dim = cos.shape
    packed, packed_outs, outs = [], [], []
    for x, heads in ((q, call.num_heads), (k, call.num_kv_heads)):
        # New outputs are tensors of their own, not views, so that they may be written to.
        out = x if x is None or call.inplace else x.new_empty(x.shape)
        shape = (total, heads, head_dim)
        packed.append(None if x is None else _rows_contiguous(x.reshape(shape)))
        packed_outs.append(None if out is None else out.view(shape))
        outs.append(out)
    call.rotate(*packed, *packed_outs, cos, sin, transposed=call.transposed)
    return outs[0], outs[1]


class _Rotary(torch.autograd.Function):
    """Rotates q and k of any shape that holds `(total, heads, head_dim)`; each may be None."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, call: _Call
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(cos, sin)
        ctx.call = call
        ctx.set_materialize_grads(False)
        outs = _rotated(q, k, cos, sin, call)
        if call.inplace:
            ctx.mark_dirty(*outs)
        # Otherwise the gradient of one alone would give the other a history too.
        needed = zip(outs, ctx.needs_input_grad[:2], strict=True)
        ctx.mark_non_differentiable(
            *(out for out, needs in needed if not needs and out is not None)
        )
        return outs

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Rotating is linear: its gradient is the transposed rotation of what comes in. It never is
        # in place. A gradient may be shared with other branches, expanded, or kept by a hook, none
        # of which can be seen from here; and a new tensor costs no more traffic than an old one.
        cos, sin = ctx.saved_tensors
        call = ctx.call._replace(inplace=False, transposed=not ctx.call.transposed)
        dq = dq if ctx.needs_input_grad[0] else None
        dk = dk if ctx.needs_input_grad[1] else None
        # What nobody differentiates again need not be recorded, which takes the host twice as long.
        rotated = _Rotary.apply if torch.is_grad_enabled() else _rotated
        return *rotated(dq, dk, cos, sin, call), None, None, None


def _validate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must have shape (total, num_heads, head_dim), got {tuple(x.shape)}"
            )
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    total, _, head_dim = q.shape
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"head_dim must be even, since halves are rotated, got {head_dim}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.shape[0] != total or k.shape[2] != head_dim:
        raise ValueError(
            f"k must have q's total {total} and head_dim {head_dim}, got {tuple(k.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((total, head_dim), (1, total, head_dim)):
            raise ValueError(
                f"{name} must have shape {(total, head_dim)} or {(1, total, head_dim)}, one row a "
                f"token of q, got {tuple(table.shape)}"
            )
    if sin.dim() != cos.dim():
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
