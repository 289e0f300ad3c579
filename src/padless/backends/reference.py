"""The reference as a backend: never chosen while a kernel can run, always there to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest, Window
from padless.layout import VarlenLayout
from padless.reference import reference_attention, visible_keys

NAME = "reference"


def version() -> str:
    """Returns the version of what computes: torch's."""
    return str(torch.__version__)


def reject(request: AttentionRequest) -> str | None:
    """Says why the reference cannot serve the request; None if it can."""
    if not request.dtype.is_floating_point:
        return f"needs a floating dtype, got {request.dtype}"
    return None


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
    pieces = []
    for q_i, k_i, v_i in zip(layout_q.split(q), layout_k.split(k), layout_k.split(v), strict=True):
        if k_i.shape[0] == 0:
            pieces.append(torch.zeros_like(q_i))
            continue
        visible = None
        if causal or window_size != (None, None):
            visible = visible_keys(
                q_i.shape[0],
                k_i.shape[0],
                causal=causal,
                window_size=window_size,
                device=q.device,
            )
        out = reference_attention(
            q_i[None], k_i[None], v_i[None], visible=visible, softmax_scale=softmax_scale
        )
        pieces.append(out[0])
    return torch.cat(pieces) if pieces else torch.zeros_like(q)


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
    """Attends as `varlen`; gives the logarithms of the sums too, `(num_heads, total_q)`.

    Note:
        Computed in float32, or float64 from float64; lse keeps that dtype, and is -inf where a
        query sees no key.
    """
    outs, sums = [q[:0]], [q.new_zeros(q.shape[1], 0, dtype=_exact(q.dtype))]
    for q_i, k_i, v_i in zip(layout_q.split(q), layout_k.split(k), layout_k.split(v), strict=True):
        scores, values = _scores(q_i, k_i, v_i, causal, softmax_scale, window_size)
        lse = scores.logsumexp(-1)  # (h, s)
        weights = _weights(scores, lse)
        outs.append(torch.einsum("hst,thd->shd", weights, values).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums, dim=1)


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
    """Goes back through `varlen_with_lse`: dq, dk and dv.

    With P the weights and D the sums of dout * out over head_dim: dv = P^T dout, and dS = P *
    (dout v^T - D), of which dq and dk are the products with k and q, times the scale.
    """
    dtype, groups = _exact(q.dtype), q.shape[1] // k.shape[1]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    rows, columns = layout_q.host_cu_seqlens.tolist(), layout_k.host_cu_seqlens.tolist()
    for number in range(len(layout_q.lengths)):
        a, b = slice(*rows[number : number + 2]), slice(*columns[number : number + 2])
        scores, values = _scores(q[a], k[b], v[b], causal, softmax_scale, window_size)
        weights = _weights(scores, lse[:, a].to(dtype))
        d_i, o_i, q_i = (x[a].to(dtype) for x in (dout, out, q))
        keys = k[b].to(dtype).repeat_interleave(groups, dim=1)
        dweights = torch.einsum("shd,thd->hst", d_i, values)
        dscores = weights * (dweights - (d_i * o_i).sum(-1).T.unsqueeze(-1)) * softmax_scale
        grads[0][a] = torch.einsum("hst,thd->shd", dscores, keys).to(q.dtype)
        for grad, each in (
            (grads[1], torch.einsum("hst,shd->thd", dscores, q_i)),
            (grads[2], torch.einsum("hst,shd->thd", weights, d_i)),
        ):
            grad[b] = each.unflatten(1, (k.shape[1], groups)).sum(2).to(k.dtype)
    return grads[0], grads[1], grads[2]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float, window_size: Window
) -> tuple[Tensor, Tensor]:
    """Computes one sequence's scores `(h, s, t)`, and its values for every query head."""
    dtype, groups = _exact(q.dtype), q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q.to(dtype), k) * softmax_scale
    if causal or window_size != (None, None):
        visible = visible_keys(
            q.shape[0], k.shape[0], causal=causal, window_size=window_size, device=q.device
        )
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores, v


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # A row without a key has an lse of -inf, and no weights at all.
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
