"""What the kernels' stand-ins share: the checks of what they are given, and the right numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from accuracy import Window, expected_visible
from padless.reference import reference_attention

HALF_TYPES = (torch.float16, torch.bfloat16)


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    visible: Callable[[int, int], Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attends within each sequence; gives out and the logarithms of the sums `(num_heads, total)`.

    Computes in float64, so that what it rounds is less than any kernel does.
    """
    pieces, lse = [], []
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        mask = visible(b - a, d - c)
        q_i, k_i, v_i = q[None, a:b].double(), k[None, c:d].double(), v[None, c:d].double()
        if c == d:
            pieces.append(torch.zeros_like(q_i[0]) + 0 * q_i[0])
        else:
            pieces.append(reference_attention(q_i, k_i, v_i, visible=mask, softmax_scale=scale)[0])
        keys = k_i[0].repeat_interleave(groups, dim=1)
        scores = torch.einsum("shd,thd->hst", q_i[0], keys) * scale
        lse.append(scores.masked_fill(~mask, float("-inf")).logsumexp(-1).float())
    return torch.cat(pieces).to(q.dtype), torch.cat(lse, dim=1).detach()


def check_boundaries(q: Tensor, k: Tensor, *given: Any) -> None:
    """Asserts what every kernel asks of boundaries and their longest."""
    for tensor, cu_seqlens, longest in zip((q, k), given[:2], given[2:], strict=True):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, len(tensor))
        assert type(longest) is int
        assert longest >= cu_seqlens.diff().max()


def check_tensors(q: Tensor, k: Tensor, v: Tensor, largest: int = 256) -> None:
    """Asserts what every kernel asks of q, k and v."""
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    for tensor in (q, k, v):
        assert tensor.dtype in HALF_TYPES
        assert tensor.shape[2] <= largest
        assert tensor.shape[2] % 8 == 0
        # 16 bytes are loaded at a time.
        assert tensor.stride(-1) == 1, "input tensor must have contiguous last dimension"
        assert tensor.data_ptr() % 16 == 0, "misaligned address"
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1]), "misaligned address"


def check_grouped_queries(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int) -> None:
    """Asserts that FlashAttention-2 can take grouped heads for queries, as it does for one each."""
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1]:
        assert len(q) == len(cu_seqlens_q) - 1, "shape '[batch, num_heads_k, ...]' is invalid"


def bottom_right(causal: bool, window_size: Window) -> Callable[[int, int], Tensor]:
    """Builds masks as FlashAttention from 2.1 on does."""
    return lambda n, m: expected_visible(n, m, causal=causal, window_size=window_size)


def from_minus_one(window_size: tuple[int, int]) -> Window:
    """Reads a window that is spelled with -1 for no bound."""
    assert type(window_size) is tuple
    assert all(type(bound) is int and bound >= -1 for bound in window_size)
    left, right = (None if bound == -1 else bound for bound in window_size)
    return (left, right)


def go_back(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: tuple[Any, ...],
    visible: Callable[[int, int], Tensor],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dq, dk and dv; asserts that out and lse are those of the forward."""
    assert scale is not None
    assert dout.shape == out.shape == q.shape
    assert dout.dtype == out.dtype == q.dtype
    leaves = [x.detach().clone() for x in (q, k, v)]
    check = attend_within(*leaves, *boundaries[:2], visible, scale)
    assert torch.equal(out, check[0])
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert torch.equal(lse, check[1])
    with autograd_again():
        inputs = [x.requires_grad_() for x in leaves]
        again, _ = attend_within(*inputs, *boundaries[:2], visible, scale)
        dq, dk, dv = torch.autograd.grad(again, inputs, dout)
    return dq, dk, dv


@contextmanager
def autograd_again() -> Iterator[None]:
    """Records inside an operator, where autograd is off whatever `enable_grad` says."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradCPU", "ADInplaceOrView"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
