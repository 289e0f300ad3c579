"""Backends that round as flash kernels do: one that is right, and one for each fault to be caught.

They stand where adapters stand, so that qualification and selection cannot tell them from real
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accuracy import Window, expected_visible
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

Attend = Callable[..., Tensor]
Mask = Callable[[Tensor], Tensor]


class _OneSequence(torch.autograd.Function):
    """Attention of one sequence with the roundings of FlashAttention-2, forward and backward.

    Scores and sums in float32; weights and their gradients go into products in the inputs' dtype;
    the backward pass makes weights again from lse, and takes out as it was rounded.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = torch.einsum("shd,thd->hst", q.float(), k.float()) * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        largest = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (scores - largest).exp()
        sums = weights.sum(-1, keepdim=True)
        out = torch.einsum("hst,thd->shd", weights.to(v.dtype).float(), v.float())
        out = (out / sums.clamp(min=1e-30).transpose(0, 1)).to(q.dtype)
        lse = largest + sums.log()
        ctx.save_for_backward(q, k, v, out, scores - torch.where(sums == 0, 0.0, lse))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logarithms = ctx.saved_tensors
        weights = logarithms.exp()
        dv = torch.einsum("hst,shd->thd", weights.to(q.dtype).float(), dout.float())
        dweights = torch.einsum("shd,thd->hst", dout.float(), v.float())
        mean = (dout.float() * out.float()).sum(-1).T.unsqueeze(-1)
        dscores = (weights * (dweights - mean)).to(q.dtype).float()
        dq = torch.einsum("hst,thd->shd", dscores, k.float()) * ctx.scale
        dk = torch.einsum("hst,shd->thd", dscores, q.float()) * ctx.scale
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _Graded(torch.autograd.Function):
    """Leaves a tensor as it is, and puts a fault into its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.fault(grad.clone()), None


def gradient_with(x: Tensor, fault: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns x, whose gradient will go through a function."""
    return _Graded.apply(x, fault)


def flash_like(
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
    mask: Mask = lambda mask: mask,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Attends as a kernel would; `mask` may change the pairs `(total_q, total_k)` that it sees."""
    blocks = [
        expected_visible(n, m, causal=causal, window_size=window_size)
        for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True)
    ]
    pairs = mask(torch.block_diag(*blocks).bool())
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out: Tensor = _OneSequence.apply(q, k, v, pairs.to(q.device), softmax_scale)
    return out


def planted(
    attend: Attend = flash_like,
    *,
    name: str = "planted",
    version: str = "1.0",
    reject: Callable[[AttentionRequest], str | None] = lambda request: None,
) -> Any:
    """Makes what stands for an adapter module; it counts how often it was called."""
    calls: list[AttentionRequest | None] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return attend(*args, **kwargs)

    return SimpleNamespace(
        NAME=name, version=lambda: version, reject=reject, varlen=counted, calls=calls
    )


def with_mask(mask: Callable[[Tensor, VarlenLayout, VarlenLayout], Tensor]) -> Attend:
    """Makes a backend that sees other pairs than it should, forward and backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *layouts: VarlenLayout, **options: Any) -> Tensor:
        return flash_like(q, k, v, *layouts, mask=lambda pairs: mask(pairs, *layouts), **options)

    return attend


def with_inputs(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Attend:
    """Makes a backend that computes with other q, k and v, or spoils their gradients."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *layouts: VarlenLayout, **options: Any) -> Tensor:
        return flash_like(*change(q, k, v, *layouts), *layouts, **options)

    return attend


def with_out(change: Callable[..., Tensor]) -> Attend:
    """Makes a backend whose result is changed."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *layouts: VarlenLayout, **options: Any) -> Tensor:
        return change(flash_like(q, k, v, *layouts, **options), q, k, v, *layouts)

    return attend


def one_pair(mask: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout, visible: bool) -> Tensor:
    """Shows or hides one pair in the middle of the longest sequence."""
    i = max(range(len(layout_q.lengths)), key=layout_q.lengths.__getitem__)
    query = sum(layout_q.lengths[:i]) + layout_q.lengths[i] // 2
    seen = mask[query].nonzero().flatten()
    if len(seen):
        mask[query, seen[len(seen) // 3] if not visible else seen[-1] + 1] = visible
    return mask


def _leaks(mask: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout) -> Tensor:
    """Shows the queries of the last sequence the last key of what comes before it."""
    mask[sum(layout_q.lengths[:-1]) :, sum(layout_k.lengths[:-1]) - 1] = True
    return mask


def _last_tile(x: Tensor, layout: VarlenLayout, factor: float) -> Tensor:
    """Multiplies the rows behind the last full tile of 64 in each sequence."""
    pieces = []
    for piece in layout.split(x):
        full = piece.shape[0] // 64 * 64
        pieces += [piece[:full], piece[full:] * factor]
    return torch.cat(pieces)


def _is_spread(*tensors: Tensor) -> bool:
    return any(bool(x.abs().amax() > 15 * x.float().square().mean().sqrt()) for x in tensors)


def _no_keys(out: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout) -> Tensor:
    """Puts NaN where a sequence has queries and no keys."""
    pieces = [
        piece * float("nan") if m == 0 else piece
        for piece, m in zip(layout_q.split(out), layout_k.lengths, strict=True)
    ]
    return torch.cat(pieces)


def _as_if_contiguous(x: Tensor) -> Tensor:
    return torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))


def _two_percent_of_dq(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return gradient_with(q, lambda dq: 1.02 * dq), k, v


def _one_head_of_dk(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    factors = torch.ones(k.shape[1], 1, dtype=k.dtype)
    factors[-1] = 1.05
    return q, gradient_with(k, lambda dk: dk * factors), v


def _dq_of_outliers(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    wrong = _is_spread(q, k, v)
    return gradient_with(q, lambda dq: 1.1 * dq if wrong else dq), k, v


def _dv_of_no_query(q: Tensor, k: Tensor, v: Tensor, *layouts: VarlenLayout) -> tuple[Tensor, ...]:
    """Leaves what was in memory in the gradient of keys that no query sees."""

    def spoil(dv: Tensor) -> Tensor:
        pieces = zip(layouts[1].split(dv), layouts[0].lengths, strict=True)
        return torch.cat([piece * float("nan") if n == 0 else piece for piece, n in pieces])

    return q, k, gradient_with(v, spoil)


# Each with what a probe must show for it to be caught.
FAULTS: dict[str, Attend] = {
    "dq_off_by_2_percent": with_inputs(_two_percent_of_dq),
    "dk_of_one_head_off_by_5_percent": with_inputs(_one_head_of_dk),
    "wrong_kv_head": with_inputs(lambda q, k, v, *_: (q, k.roll(1, 1), v.roll(1, 1))),
    "heads_interleaved": with_inputs(
        lambda q, k, v, *_: (
            q.unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(1, 2),
            k,
            v,
        )
    ),
    "sees_one_key_of_the_future": with_mask(
        lambda mask, *_: mask | torch.cat([mask[:, :1], mask[:, :-1]], 1)
    ),
    "misses_its_own_key": with_mask(
        lambda mask, *_: torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    ),
    "leaks_a_key_of_another_sequence": with_mask(_leaks),
    "one_pair_too_few": with_mask(lambda mask, *layouts: one_pair(mask, *layouts, visible=False)),
    "one_pair_too_many": with_mask(lambda mask, *layouts: one_pair(mask, *layouts, visible=True)),
    "dq_wrong_on_outliers_only": with_inputs(_dq_of_outliers),
    "nan_on_outliers_only": with_out(
        lambda out, q, k, v, *_: out * float("nan") if _is_spread(q, k, v) else out
    ),
    "out_of_last_tile_off_by_5_percent": with_out(
        lambda out, q, k, v, layout_q, _: _last_tile(out, layout_q, 1.05)
    ),
    "dq_of_last_tile_off_by_20_percent": with_inputs(
        lambda q, k, v, layout_q, _: (
            gradient_with(q, lambda dq: _last_tile(dq, layout_q, 1.2)),
            k,
            v,
        )
    ),
    "nan_without_keys": with_out(lambda out, q, k, v, *layouts: _no_keys(out, *layouts)),
    "memory_in_dv_without_queries": with_inputs(_dv_of_no_query),
    "strides_ignored": with_inputs(lambda q, k, v, *_: (_as_if_contiguous(q), k, v)),
    "another_dtype": with_out(lambda out, *_: out.double()),
    "another_shape": with_out(lambda out, *_: out.flatten(1)),
}
