"""`varlen_attention`: attention within each sequence of a packed batch, and what it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from padless import compiled
from padless.backends.request import Window
from padless.dispatch import attend
from padless.environment import is_compiling
from padless.layout import VarlenLayout


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    *,
    layout_k: VarlenLayout | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attends within each sequence of packed tensors; no sequence sees another.

    Args:
        q: `(total_q, num_heads, head_dim)`, floating.
        k: `(total_k, num_kv_heads, head_dim)`, dtype and device of q; num_heads is a multiple of
            num_kv_heads, and KV heads are not repeated in memory where the backend allows.
        v: shape, dtype and device of k.
        layout: boundaries of the sequences in q, and in k unless layout_k is given.
        layout_k: boundaries in k and v, as many sequences as layout.
        causal: key j is visible to query i if j <= i + seqlen_k - seqlen_q (bottom-right).
        softmax_scale: factor of the scores, default `head_dim ** -0.5`.
        window_size: (left, right), keys visible on either side of a query's own, which is at
            i + seqlen_k - seqlen_q; inclusive, None for no bound. causal makes right 0.
        deterministic: whether gradients repeat bit for bit; a backend that cannot do so is passed
            over. Default: what `torch.use_deterministic_algorithms` has set.
        backend: "auto", or the name of one, which is used or raises.

    Returns:
        `(total_q, num_heads, head_dim)` in q's dtype.

    Raises:
        TypeError: dtypes differ, are not floating, or a layout is not a VarlenLayout.
        ValueError: shapes, devices, layouts or the window do not fit.
        BackendUnavailableError: the named backend cannot serve the call.

    Note:
        Differentiable in q, k and v. A query that sees no key gives zeros. No host
        synchronisation. One node of a graph under torch.compile, for lengths of every kind. q and
        k may differ in length per sequence (a cache before the queries); causal, without a window
        and with `window_size=(1, 0)`:

            2 queries, 4 keys:   1 1 1 0     0 1 1 0
                                 1 1 1 1     0 0 1 1
    """
    layout_k = layout if layout_k is None else layout_k
    _validate_tensors(q, k, v, layout, layout_k)
    window_size = _validate_window(window_size)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    serve = compiled.attend if is_compiling() else attend
    return serve(
        q,
        k,
        v,
        layout,
        layout_k,
        causal=causal,
        softmax_scale=scale,
        window_size=window_size,
        deterministic=deterministic,
        backend=backend,
    )


def _validate_tensors(
    q: Tensor, k: Tensor, v: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> None:
    for name, layout in (("layout", layout_q), ("layout_k", layout_k)):
        if not isinstance(layout, VarlenLayout):
            raise TypeError(
                f"{name} must be a VarlenLayout, got {type(layout).__name__}; "
                f"build one with VarlenLayout.from_mask or .from_cu_seqlens"
            )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape (total, num_heads, head_dim), got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
        if tensor.shape[2] != q.shape[2]:
            raise ValueError(f"{name} must have q's head_dim {q.shape[2]}, got {tensor.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {q.shape[1]} and {k.shape[1]}"
        )


def _validate_window(window_size: Window) -> Window:
    fits = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    for bound in window_size if fits else ():
        fits = fits and (bound is None or (type(bound) is not bool and isinstance(bound, int)))
        fits = fits and (bound is None or bound >= 0)
    if not fits:
        raise ValueError(
            f"window_size must be (left, right), each an integer of at least 0 or None for no "
            f"bound, got {window_size!r}"
        )
    return (window_size[0], window_size[1])
