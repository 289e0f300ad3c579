"""Rotary problems as data, and the checks of their numbers: for the twin, the kernel, every device.

What is right is the product with a matrix written out entry by entry, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accuracy import draw
from padless.kernels.rotary import apply_rotary


@dataclass(frozen=True)
class RotaryCase:
    """Shapes of one call.

    Attributes:
        name: the test's id.
        total: tokens.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_dim: size of one head.
        table_dtype: of cos and sin; None for q's.
    """

    name: str
    total: int
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    table_dtype: torch.dtype | None = torch.float32

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws q, k and tables without structure: their halves differ, and they turn nothing."""
        table_dtype = dtype if self.table_dtype is None else self.table_dtype
        table = (1, self.total, self.head_dim)
        return (
            draw(self.total, self.num_heads, self.head_dim, seed=1, dtype=dtype, device=device),
            draw(self.total, self.num_kv_heads, self.head_dim, seed=2, dtype=dtype, device=device),
            draw(*table, seed=3, dtype=table_dtype, device=device),
            draw(*table, seed=4, dtype=table_dtype, device=device),
        )


# One token and none; heads that are one, odd, no power of two, and more than a program or a thread
# takes; one pair and sizes of head that are no power of two; tables in either dtype; for the CPU's
# twin more tokens than one of its pieces (2^17 numbers) and a piece that is not full.
CASES = (
    RotaryCase("one_token", 1),
    RotaryCase("no_token", 0),
    RotaryCase("one_head_one_pair", 3, 1, 1, 2),
    RotaryCase("smollm_9_3_64", 5, 9, 3),
    RotaryCase("mqa_5_1_128", 4, 5, 1, 128),
    RotaryCase("mha_4_4_80", 3, 4, 4, 80),
    RotaryCase("heads_33_11", 2, 33, 11, 32),
    RotaryCase("heads_64_8_128", 2, 64, 8, 128),
    RotaryCase("more_kv_heads_2_5", 3, 2, 5, 16),
    *(RotaryCase(f"head_dim_{d}", 3, 3, 1, d) for d in (6, 40, 72, 96, 112, 256)),
    RotaryCase("tables_in_q_dtype", 4, table_dtype=None),
    RotaryCase("pieces", 150, 7, 2, 128),
)
# The interpreter has no pieces, and takes a millisecond for each operation of each program.
INTERPRETED = tuple(case for case in CASES if case.name != "pieces")


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """Writes out the matrix `(total, head_dim, head_dim)` that each token is multiplied by."""
    cos, sin = (x.detach().double().reshape(-1, x.shape[-1]) for x in (cos, sin))
    total, head_dim = cos.shape
    half = head_dim // 2
    matrix = torch.zeros(total, head_dim, head_dim, dtype=torch.float64, device=cos.device)
    for i in range(half):
        j = i + half
        matrix[:, i, i] = cos[:, i]
        matrix[:, i, j] = -sin[:, i]
        matrix[:, j, j] = cos[:, j]
        matrix[:, j, i] = sin[:, j]
    return matrix


def assert_rounded_once(
    name: str, got: Tensor, x: Tensor, matrix: Tensor, *, ulps: float = 0.5
) -> None:
    """Asserts that `got` is `matrix @ x`, computed in float32 or better and rounded once.

    Args:
        name: what the tensor is, for the failure text.
        got: `(total, heads, head_dim)` in x's dtype.
        x: like got.
        matrix: float64 `(total, head_dim, head_dim)`.
        ulps: how far the one rounding goes, in units of the last place.
    """
    assert got.dtype == x.dtype, f"{name}: dtype {got.dtype}, expected {x.dtype}"
    assert got.shape == x.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(x.shape)}"
    wide = x.detach().double()
    truth = torch.einsum("nij,nhj->nhi", matrix, wide)
    terms = torch.einsum("nij,nhj->nhi", matrix.abs(), wide.abs())
    info = torch.finfo(got.dtype)
    # Two products and a sum, each rounded; then the dtype's own rounding, whose unit of the last
    # place stops shrinking at the smallest normal number.
    compute_eps = min(torch.finfo(torch.float32).eps, info.eps)
    bound = 2 * compute_eps * terms + ulps * info.eps * truth.abs().clamp(min=info.tiny)
    excess = (got.detach().double() - truth).abs() - bound
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0, f"{name}: off by {worst:.3g} more than one rounding allows"


def assert_case_right(
    case: RotaryCase,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    inplace: bool,
    ulps: float = 0.5,
) -> None:
    """Asserts that outputs and gradients of a call are right, and that it wrote where it said.

    q and k are views of `(1, total, heads * head_dim)`, as projections hand them over.
    """
    q0, k0, cos, sin = case.inputs(dtype, device)
    leaves = [x.flatten(1).unsqueeze(0).clone().requires_grad_() for x in (q0, k0)]
    # A product by one stands for the projection: what it gives is no leaf and saved by nobody.
    products = [leaf * torch.ones((), dtype=dtype, device=device) for leaf in leaves]
    q, k = (p.view(x.shape) for p, x in zip(products, (q0, k0), strict=True))
    out_q, out_k = apply_rotary(q, k, cos, sin, inplace=inplace)
    matrix = rotation(cos, sin)
    assert_rounded_once("q", out_q, q0, matrix, ulps=ulps)
    assert_rounded_once("k", out_k, k0, matrix, ulps=ulps)
    for out, product, x in zip((out_q, out_k), products, (q0, k0), strict=True):
        if inplace:
            assert out.data_ptr() == product.data_ptr()
        else:
            assert out.is_contiguous()
            assert torch.equal(product.detach().view(x.shape), x)
    douts = [draw(*x.shape, seed=s, dtype=dtype, device=device) for s, x in ((5, q0), (6, k0))]
    kept = [dout.clone() for dout in douts]
    grads = torch.autograd.grad((out_q, out_k), leaves, douts)
    for name, grad, dout, before in zip(("dq", "dk"), grads, douts, kept, strict=True):
        assert torch.equal(dout, before), f"{name}: the gradient that came in was written over"
        assert_rounded_once(name, grad.view(dout.shape), dout, matrix.mT, ulps=ulps)


def assert_strided_right(dtype: torch.dtype, device: str = "cpu", *, ulps: float = 0.5) -> None:
    """Asserts that slices, and heads first in memory, are rotated and nothing beside them."""
    case = RotaryCase("strided", 5, 3, 2, 16)
    q0, k0, cos0, sin0 = case.inputs(dtype, device)
    matrix = rotation(cos0, sin0)
    expected = apply_rotary(q0, k0, cos0, sin0, inplace=False)
    for q, k, cos, sin, surroundings in _strided_copies(q0, k0, cos0[0], sin0[0]):
        holes = [x.isnan() for x in surroundings]
        got = apply_rotary(q, k, cos, sin, inplace=False)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(q, q0) and torch.equal(k, k0)
        with torch.no_grad():
            got = apply_rotary(q, k, cos, sin, inplace=True)
        for out, x, x0 in zip(got, (q, k), (q0, k0), strict=True):
            assert out.data_ptr() == x.data_ptr()
            assert out.stride() == x.stride()
            assert_rounded_once("strided", x, x0, matrix, ulps=ulps)
        for x, hole in zip(surroundings, holes, strict=True):
            assert torch.equal(x.isnan(), hole), "a number beside q and k was written"


def _strided_copies(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]]:
    """Lays the inputs out in larger tensors of NaN, each time in another way."""
    total, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    nan = float("nan")
    # Slices of one product for q, k and v, between guards; tables in the middle of wider ones.
    qkv = q.new_full((total + 2, num_heads + 2 * num_kv_heads, head_dim), nan)[1:-1]
    tables = cos.new_full((total, 4, head_dim), nan)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    views = (*qkv.split(heads, dim=1)[:2], tables[:, 1], tables[:, 2])
    yield *_filled(views, (q, k, cos, sin)), [qkv, tables]
    # Heads first, more of each than are taken, an odd distance between tokens and from the start.
    wide_q = q.new_full((num_heads + 2, total, head_dim + 3), nan)
    wide_k = k.new_full((num_kv_heads + 2, total, head_dim + 3), nan)
    views = (
        *(x[1:-1, :, 1:-2].transpose(0, 1) for x in (wide_q, wide_k)),
        *torch.full((2, total, head_dim + 1), nan, dtype=cos.dtype, device=cos.device)[..., 1:],
    )
    yield *_filled(views, (q, k, cos, sin)), [wide_q, wide_k]


def _filled(views: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    return views


def assert_last_dimension_strided_right(device: str = "cpu") -> None:
    """Asserts that inputs whose numbers do not lie side by side give new and right tensors."""
    case = RotaryCase("last_dimension_strided", 5, 3, 2, 8)
    q0, k0, cos0, sin0 = case.inputs(torch.float32, device)
    q, k = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q0, k0))
    cos, sin = (x[0].T.contiguous().T for x in (cos0, sin0))
    for grad in (False, True):
        outs = apply_rotary(q.requires_grad_(grad), k, cos, sin, inplace=True)
        for out, x, x0 in zip(outs, (q, k), (q0, k0), strict=True):
            assert torch.equal(x, x0)
            assert_rounded_once("last dimension strided", out, x0, rotation(cos, sin))


def assert_one_gradient_right(which: str, device: str = "cpu", *, inplace: bool) -> None:
    """Asserts that q alone, or k alone, takes part in the graph, and gets the right gradient."""
    case = RotaryCase("one_gradient", 4, 3, 2, 8)
    q0, k0, cos, sin = case.inputs(torch.float32, device)
    leaf = (q0 if which == "q" else k0).clone().requires_grad_()
    q = leaf * 1 if which == "q" else q0.clone()
    k = leaf * 1 if which == "k" else k0.clone()
    out_q, out_k = apply_rotary(q, k, cos, sin, inplace=inplace)
    assert [out_q.requires_grad, out_k.requires_grad] == [which == "q", which == "k"]
    out = out_q if which == "q" else out_k
    # An expanded gradient, as `sum` makes it.
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert_rounded_once(which, grad, torch.ones_like(leaf), rotation(cos, sin).mT)


def assert_one_output_used_right(which: str, device: str = "cpu", *, inplace: bool) -> None:
    """Asserts that the gradient is right, and nothing else computed, if one output goes nowhere."""
    case = RotaryCase("one_output", 4, 3, 2, 8)
    q0, k0, cos, sin = case.inputs(torch.float32, device)
    leaves = [x.clone().requires_grad_() for x in (q0, k0)]
    outs = apply_rotary(leaves[0] * 1, leaves[1] * 1, cos, sin, inplace=inplace)
    i = "qk".index(which)
    # Heads first in memory, as an attention that wants them so returns it.
    heads_first = leaves[i].transpose(0, 1).shape
    dout = draw(*heads_first, seed=5, dtype=torch.float32, device=device).transpose(0, 1)
    grads = torch.autograd.grad(outs[i], leaves, dout, allow_unused=True)
    assert_rounded_once(which, grads[i], dout, rotation(cos, sin).mT)
    assert grads[1 - i] is None


def assert_adjoint(dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts <R x, y> == <x, R^T y> for the gradient R^T, to the rounding of a sum."""
    case = replace(CASES[0], total=6, head_dim=72)
    q0, k0, cos, sin = case.inputs(dtype, device)
    q, k = q0.requires_grad_(), k0.requires_grad_()
    outs = apply_rotary(q, k, cos, sin, inplace=False)
    douts = [draw(*x.shape, seed=7, dtype=dtype, device=device) for x in (q, k)]
    grads = torch.autograd.grad(outs, (q, k), douts)
    for out, dout, x, grad in zip(outs, douts, (q, k), grads, strict=True):
        ahead = (out.detach().double() * dout.double()).sum()
        back = (x.detach().double() * grad.double()).sum()
        scale = out.detach().double().norm() * dout.double().norm()
        assert abs(ahead - back) <= 4 * torch.finfo(dtype).eps * scale


@contextmanager
def version_bumped(*tensors: Tensor) -> Iterator[None]:
    """Asserts that each tensor counts as written to in the block."""
    before = [x._version for x in tensors]
    yield
    for x, version in zip(tensors, before, strict=True):
        assert x._version > version
