"""`ulysses_attention` and `ring_attention` compute what one process does, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from padless import VarlenLayout, varlen_attention
from sequence.attention_jobs import drawn
from sequence.pool import pool

JOB = "sequence.attention_jobs:attend"
# Documents across the borders of shards; of lengths 1 and 0; one alone; fewer tokens than ranks;
# none at all; many, of which most are not cut.
LENGTHS = {
    "documents": [5, 19, 1, 0, 12],
    "one": [37],
    "ones": [1] * 9,
    "few": [2, 1],
    "one token": [1],
    "none": [0],
    "many": [3, 4, 50, 2, 7, 9, 1, 6, 30, 8],
}
HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1), "gqa 12/4": (12, 4), "kv 3": (12, 3)}


def expected_of(
    lengths: list[int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    q, k, v, dout = drawn(lengths, heads, dtype, scale)
    leaves = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
    out = varlen_attention(*leaves, VarlenLayout.from_lengths(lengths), **options)
    out.backward(dout)
    return out.detach(), *(x.grad for x in leaves)


def _check(size: int, algorithm: str, *arguments: Any) -> None:
    expected = expected_of(*arguments)
    for found in pool(size).run(JOB, algorithm, *arguments):
        assert_same(found, expected)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Compares out, dq, dk and dv to what their dtype allows."""
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(got.dtype, 3e-2)
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_documents_of_all_kinds(size: int, algorithm: str, lengths: list[int]) -> None:
    _check(size, algorithm, lengths, HEADS["gqa"], torch.float64, {})


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_of_all_kinds(size: int, algorithm: str, heads: tuple[int, int]) -> None:
    # 12 heads of 3 KV heads over 2 or 4 ranks: copies of a KV head serve parts of its queries.
    _check(size, algorithm, LENGTHS["documents"], heads, torch.float64, {})


@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(algorithm: str, dtype: torch.dtype) -> None:
    _check(2, algorithm, LENGTHS["many"], HEADS["gqa"], dtype, {})


@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
@pytest.mark.parametrize("options", [{"causal": False}, {"softmax_scale": 0.7}], ids=str)
def test_options(algorithm: str, options: dict[str, Any]) -> None:
    _check(4, algorithm, LENGTHS["many"], HEADS["gqa"], torch.float64, options)


def test_window_of_ulysses() -> None:
    options = {"window_size": (4, 0)}
    _check(2, "ulysses", LENGTHS["many"], HEADS["gqa"], torch.float64, options)


@pytest.mark.parametrize("size", [2, 4])
def test_large_scores_do_not_overflow_the_merge(size: int) -> None:
    # Scores of hundreds: exp of them is infinite in float32, whose roundings of them are 1e-4.
    arguments = ([40], HEADS["mha"], torch.float32, {}, 12.0)
    expected = expected_of(*arguments)
    for found in pool(size).run(JOB, "ring", *arguments):
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_of_ulysses(chunks: int) -> None:
    expected = expected_of(LENGTHS["documents"], (8, 4), torch.float64, {})
    found = pool(2).run(
        JOB, "ulysses", LENGTHS["documents"], (8, 4), torch.float64, {"chunks": chunks}
    )
    for got, want in zip(found[0], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
