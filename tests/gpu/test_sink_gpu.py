"""float32 gradients where every query attends to the first token, as trained models do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from padless.attention import varlen_attention
from padless.layout import VarlenLayout

LENGTHS = (173, 96, 64, 45, 101, 38, 57, 72, 66, 51, 49, 51)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def _draw(device: torch.device, sink: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws padded q, k, v and dout in float64, heads first; most weight is on the first keys."""
    torch.manual_seed(0)
    batch, seqlen = len(LENGTHS), max(LENGTHS)
    real = torch.arange(seqlen) < torch.tensor(LENGTHS)[:, None]
    q = torch.randn(batch, HEADS, seqlen, HEAD_DIM, dtype=torch.float64)
    k = torch.randn(batch, KV_HEADS, seqlen, HEAD_DIM, dtype=torch.float64)
    v = torch.randn_like(k)
    q[..., 0] += 6.0
    k[:, :, 0, 0] += sink
    v[:, :, 0] *= 0.05
    dout = torch.randn_like(q)
    drawn = [x.float().double().to(device) for x in (q, k, v, dout)]
    return drawn[0], drawn[1], drawn[2], drawn[3], real.to(device)


def _masked(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """What transformers computes: one masked call on the padded batch, KV heads repeated."""
    seqlen = real.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=real.device).tril()
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, dim=1),
        v.repeat_interleave(groups, dim=1),
        attn_mask=causal & real[:, None, None, :] | torch.eye(seqlen).bool().to(real.device),
    )


def _flat(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    layout = VarlenLayout.from_mask(real)
    packed = [layout.unpad(x.transpose(1, 2)) for x in (q, k, v)]
    return layout.pad(varlen_attention(*packed, layout, backend="sdpa")).transpose(1, 2)


@pytest.mark.parametrize("sink", [0.0, 12.0, 60.0])
def test_gradients_are_as_near_to_the_truth_as_those_of_the_masked_call(
    sink: float, device: torch.device
) -> None:
    q, k, v, dout, real = _draw(device, sink)
    dout = dout * real[:, None, :, None]

    def gradients(attend: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, real)  # type: ignore[operator]
        return list(torch.autograd.grad(out, leaves, dout.to(dtype)))

    truth = gradients(_masked, torch.float64)
    stock = gradients(_masked, torch.float32)
    got = gradients(_flat, torch.float32)
    for name, *values in zip(("dq", "dk", "dv"), got, stock, truth, strict=True):
        ours, masked, true = ((x.double())[real[:, None, :].expand(x.shape[:3])] for x in values)
        floor = 64 * torch.finfo(torch.float32).eps * true.pow(2).mean().sqrt()
        error, allowed = ((x - true).pow(2).mean().sqrt() for x in (ours, masked))
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, masked call {allowed:.2e}"


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
