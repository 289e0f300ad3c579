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
