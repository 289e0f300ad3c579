"""Heads as blocks for the ranks: the numbers of the plain formula, and of its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from padless.parallel import heads
from padless.parallel.heads import to_blocks, to_rows

# Size, chunks, heads of each tensor, head_dim.
SHAPES = {
    "two ranks": (2, 1, (8, 4, 4), 16),
    "in two parts": (2, 2, (8, 4, 4), 16),
    "four ranks": (4, 1, (4, 4, 4), 8),
    "odd size": (2, 1, (4, 2, 2), 5),
    "no tokens": (2, 2, (8, 4, 4), 16),
}


def _formula(size: int, chunks: int, *tensors: Tensor) -> list[Tensor]:
    split = [x.unflatten(1, (size, chunks, -1)) for x in tensors]
    return [
        torch.cat([x[:, :, chunk].transpose(0, 1) for x in split], dim=2) for chunk in range(chunks)
    ]


def _drawn(name: str, dtype: torch.dtype) -> tuple[int, int, list[Tensor]]:
    size, chunks, counts, head_dim = SHAPES[name]
    own = 0 if name == "no tokens" else 7
    tensors = [torch.randn(own, n, head_dim).to(dtype).requires_grad_() for n in counts]
    return size, chunks, tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_and_their_gradients(name: str, dtype: torch.dtype) -> None:
    size, chunks, tensors = _drawn(name, dtype)
    found, want = to_blocks(tensors, size, chunks), _formula(size, chunks, *tensors)
    assert all(x.is_contiguous() for x in found)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    grads = [torch.randn_like(x) for x in want]
    expected = torch.autograd.grad(want, tensors, grads)
    for a, b in zip(torch.autograd.grad(found, tensors, grads), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_those_of_the_blocks(name: str) -> None:
    size, chunks, (x, *_) = _drawn(name, torch.float32)
    blocks = [y.detach().requires_grad_() for y in _formula(size, chunks, x)]
    rows = to_rows(blocks)
    assert torch.equal(rows, x)
    grad = torch.randn_like(rows)
    found = torch.autograd.grad(rows, blocks, grad)
    for a, b in zip(found, _formula(size, chunks, grad), strict=True):
        assert torch.equal(a, b)


# Views as a projection of q, k and v in one leaves them, and such as nothing wide fits.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of a wider row": lambda x: x[:, 2:6],
    "begins at an odd number": lambda x: x.flatten()[1 : 1 + 6 * 8 * 16].view(6, 8, 16)[:, :4],
    "heads in front": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, :4],
    "every second number": lambda x: x[:, :4, ::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    view = VIEWS[name](torch.randn(7, 8, 16).to(torch.bfloat16))
    (found,), (want,) = to_blocks([view], 2, 1), _formula(2, 1, view)
    assert torch.equal(found, want)


def test_bits_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # All numbers of bfloat16, those among them that are none.
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(64, 8, 128)
    seen = []
    is_wide = heads._is_wide
    monkeypatch.setattr(heads, "_is_wide", lambda x: seen.append(is_wide(x)) or seen[-1])
    (found,) = to_blocks([x], 2, 1)
    assert torch.equal(found.view(torch.int16), _formula(2, 1, x)[0].view(torch.int16))
    assert seen == [True, True]


def test_an_address_that_no_wide_piece_may_begin_at_is_seen() -> None:
    memory = bytearray(2 + 7 * 4 * 16 * 2)
    aligned, beside = (
        torch.frombuffer(memory, dtype=torch.bfloat16, count=7 * 4 * 16, offset=offset)
        for offset in (0, 2)
    )
    assert sum(heads._is_wide(x.view(7, 4, 16)) for x in (aligned, beside)) <= 1
    assert heads._is_wide(torch.zeros(7, 4, 16, dtype=torch.bfloat16))
