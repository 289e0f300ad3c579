"""How torch's varlen kernel is called in each of its spellings; stand-ins need no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import expected_visible
from attention_cases import Case
from padless.backends import torch_varlen
from padless.layout import VarlenLayout
from padless.reference import reference_attention


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Checks what every version of the kernel asks for, and attends by the reference."""
    bounds = []
    for cu_seqlens, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert type(longest) is int
        assert longest >= cu_seqlens.diff().max()
        bounds.append(cu_seqlens.tolist())
    if max_q == 1 and query.shape[1] > key.shape[1]:
        assert len(query) == len(cu_seq_q) - 1, "shape '[batch, num_heads_k, ...]' is invalid"
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1, "input tensor must have contiguous last dimension"
    pieces = []
    for (a, b), (c, d) in zip(*(list(pairwise(one)) for one in bounds), strict=True):
        visible = expected_visible(b - a, d - c, causal=causal)
        q, k, v = query[None, a:b], key[None, c:d], value[None, c:d]
        pieces.append(reference_attention(q, k, v, visible=visible, softmax_scale=scale)[0])
    return torch.cat(pieces)


def kernel_with_flag(*packed: Any, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """The first spelling."""
    return compute(*packed, causal=is_causal, scale=scale)


def kernel_with_window(
    *packed: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """The second: causal is a window, and grouped heads need no word."""
    assert type(window_size) is tuple
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    return compute(*packed, causal=causal, scale=scale)


def kernel_with_gqa(
    query: Tensor,
    key: Tensor,
    *packed: Any,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The third: grouped heads are refused unless they are asked for."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return kernel_with_window(query, key, *packed, scale=scale, window_size=window_size)


KERNELS = (kernel_with_flag, kernel_with_window, kernel_with_gqa)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__)
def _installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch, request.param)
    yield
    torch_varlen._kernel.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    """Lets the adapter find a stand-in where torch keeps its kernel."""
    module = SimpleNamespace(varlen_attn=kernel)
    monkeypatch.setattr(torch_varlen, "import_optional", lambda name: (module, ""))
    torch_varlen._kernel.cache_clear()


def run(case: Case, inputs: list[Tensor]) -> Tensor:
    """Calls the adapter past `reject`, which would ask for CUDA."""
    return torch_varlen.varlen(
        *inputs,
        VarlenLayout.from_lengths(case.seqlens_q),
        VarlenLayout.from_lengths(case.keys),
        causal=case.causal,
        softmax_scale=case.scale,
    )


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_every_spelling_of_the_kernel_is_asked_for_the_same(
    num_kv_heads: int, causal: bool
) -> None:
    case = Case(
        "call", (3, 0, 2), (5, 4, 1), 4, num_kv_heads, head_dim=16, causal=causal, softmax_scale=0.3
    )
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    expected = case.attend(*inputs, backend="reference")
    torch.testing.assert_close(run(case, inputs), expected)


# The kernel of torch 2.11 reshapes q by the number of sequences if each has one query at most.
@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
@pytest.mark.parametrize("seqlens_q", [(1, 1, 1), (1, 0, 1)], ids=["all", "one_without"])
def test_one_query_each_is_served_also_where_a_sequence_has_none(
    seqlens_q: tuple[int, ...], causal: bool
) -> None:
    case = Case("step", seqlens_q, (5, 4, 2), head_dim=16, causal=causal)
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    expected = case.attend(*inputs, backend="reference")
    torch.testing.assert_close(run(case, inputs), expected)


@pytest.mark.usefixtures("_installed")
def test_strides_that_the_kernel_refuses_are_made_good() -> None:
    case = Case("strided", (3, 2), head_dim=16)
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    views = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs]
    assert all(view.stride(-1) != 1 for view in views)
    assert torch.equal(run(case, views), run(case, inputs))


def test_heads_that_are_slices_of_a_fused_tensor_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.extend(x.data_ptr() for x in (query, key, value))
        return query

    install(monkeypatch, kernel)
    views = list(torch.zeros(5, 3, 6, 16).unbind(1))
    run(Case("fused", (3, 2), head_dim=16), views)
    torch_varlen._kernel.cache_clear()
    assert seen == [view.data_ptr() for view in views]
