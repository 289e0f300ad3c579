"""Measuring sticks that the tests share: error budgets against float64, and the mask probe.

Nothing here calls a mask, a layout or a split of padless: what is right is written out once more,
so that a fault there cannot hide in the expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Window = tuple[int | None, int | None]


def assert_within_budget(
    name: str, got: Tensor, baseline: Tensor, truth: Tensor, *, max_factor: float
) -> None:
    """Asserts that a result is about as near to the truth as eager maths in the same dtype.

    Args:
        name: what the tensor is, for the failure text.
        got: the result under test, in the test dtype.
        baseline: the same maths in the test dtype by an independent order of operations.
        truth: float64, computed from the very same inputs.
        max_factor: share of the baseline's worst error that the worst error may reach; the root
            mean square may reach 2 of the baseline's.
    """
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, got {truth.dtype}"
    assert got.dtype == baseline.dtype, f"{name}: dtype {got.dtype}, expected {baseline.dtype}"
    assert got.shape == truth.shape == baseline.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    if truth.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} numbers are not finite"
    errors = (got.double() - truth).abs()
    allowed = (baseline.double() - truth).abs()
    # The floor is for results that the baseline happens to hit exactly, such as one visible key,
    # and for gradients that are zero, where terms of the size of the inputs cancel.
    eps = torch.finfo(got.dtype).eps
    floors = {
        "RMS": eps / 4 * max(_rms(truth), 0.01),
        "max": eps * max(truth.abs().max().item(), 0.01),
    }
    budgets = {"RMS": 2 * _rms(allowed), "max": max_factor * allowed.max().item()}
    found = {"RMS": _rms(errors), "max": errors.max().item()}
    worst = tuple((errors == errors.max()).nonzero()[0].tolist())
    for kind, error in found.items():
        budget = budgets[kind] + floors[kind]
        assert error <= budget, (
            f"{name}: {kind} error {error:.3g} is over its budget {budget:.3g} "
            f"(ratio {error / budget if budget else float('inf'):.2f}), worst at {worst}: "
            f"got {got[worst].item():.6g}, truth {truth[worst].item():.6g}"
        )


def eager_baseline(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float
) -> Tensor:
    """Computes attention of one sequence in its own dtype, in another order than the reference.

    The scale goes on q, groups are an extra dimension, and the weights are normalised last.

    Args:
        q: `(seqlen_q, num_heads, head_dim)`.
        k: `(seqlen_k, num_kv_heads, head_dim)`.
        v: like k.
        visible: bool `(seqlen_q, seqlen_k)`.
        softmax_scale: factor of the scores.
    """
    seqlen_q, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    groups = num_heads // num_kv_heads
    grouped = (q * softmax_scale).reshape(seqlen_q, num_kv_heads, groups, head_dim)
    rows = grouped.permute(1, 2, 0, 3)  # (hkv, groups, s, d)
    scores = rows @ k.permute(1, 2, 0).unsqueeze(1)  # (hkv, groups, s, t)
    scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    if visible.shape[1]:
        scores = scores - scores.detach().amax(-1, keepdim=True)
    weights = scores.exp() * visible
    sums = weights.sum(-1, keepdim=True)
    out = (weights @ v.transpose(0, 1).unsqueeze(1)) / torch.where(sums == 0, 1, sums)
    return out.permute(2, 0, 1, 3).reshape(seqlen_q, num_heads, head_dim)


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Draws normal numbers in the test dtype, so that promoting them to float64 is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def expected_visible(
    seqlen_q: int, seqlen_k: int, *, causal: bool, window_size: Window = (None, None)
) -> Tensor:
    """Writes out which keys `(seqlen_q, seqlen_k)` each query of one sequence sees."""
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    shift = seqlen_k - seqlen_q
    left, right = window_size
    if causal:
        visible = visible.tril(shift)
    if left is not None:
        visible = visible.triu(shift - left)
    if right is not None:
        visible = visible.tril(shift + right)
    return visible


def visible_keys(
    attend: Attend,
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Tensor:
    """Reads off which keys reach which queries: the mask that a backend really applies.

    With q = 0 every visible key has the same weight. With V one-hot over head_dim keys at a time,
    in one KV head at a time, the non-zeros of the output are the visible keys.

    Args:
        attend: takes packed q, k and v and gives packed out.
        seqlens_q: queries of each sequence.
        seqlens_k: keys of each sequence.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of one head, which is how many keys one call probes.
        dtype: of q, k and v.
        device: of q, k and v.

    Returns:
        bool `(total_q, num_heads, num_kv_heads, total_k)` on the CPU.
    """
    total_q, total_k = sum(seqlens_q), sum(seqlens_k)
    q = torch.zeros(total_q, num_heads, head_dim, dtype=dtype, device=device)
    k = draw(total_k, num_kv_heads, head_dim, seed=5, dtype=dtype, device=device)
    seen = torch.zeros(total_q, num_heads, num_kv_heads, total_k, dtype=torch.bool)
    for first in range(0, total_k, head_dim):
        keys = torch.arange(first, min(first + head_dim, total_k), device=device)
        for kv_head in range(num_kv_heads):
            v = torch.zeros_like(k)
            v[keys, kv_head, keys - first] = 1.0
            out = attend(q, k, v)
            assert out.isfinite().all(), "the mask probe gave numbers that are not finite"
            seen[:, :, kv_head, first : first + len(keys)] = (out != 0)[..., : len(keys)].cpu()
    return seen


def assert_mask_exact(
    attend: Attend,
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    *,
    causal: bool,
    window_size: Window = (None, None),
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """Asserts that exactly the right keys reach each query, across sequences and KV heads too."""
    seen = visible_keys(
        attend,
        seqlens_q,
        seqlens_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    blocks = [
        expected_visible(n, m, causal=causal, window_size=window_size)
        for n, m in zip(seqlens_q, seqlens_k, strict=True)
    ]
    pairs = torch.block_diag(*blocks).bool()  # (total_q, total_k)
    groups = num_heads // num_kv_heads
    served = torch.tensor(
        [[h // groups == g for g in range(num_kv_heads)] for h in range(num_heads)]
    )
    expected = pairs[:, None, None, :] & served[None, :, :, None]
    wrong = (seen != expected).nonzero()
    assert len(wrong) == 0, (
        f"{len(wrong)} of {expected.numel()} mask entries are wrong, the first at (query, head, KV "
        f"head, key) {tuple(wrong[0].tolist())}: expected {bool(expected[tuple(wrong[0])])}"
    )


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
