"""`varlen_attention` on CUDA: numbers, masks, isolation, and who serves which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from varlen_gpu_cases import CUDA, FA4_WRONG, GPU_CASES, MASK_CASES, SERVED, need

import padless.dispatch
from accuracy import draw
from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from padless.answers import Selection
from padless.attention import varlen_attention
from padless.backends import fa4, torch_varlen
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import select_backend
from padless.workload import as_if_much_work

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Leaves NaN in the memory that torch hands out next: what is read before written shows."""
    sizes = [2**power for power in range(8, 25) for _ in range(4)]
    blocks = [
        torch.full((size,), float("nan"), dtype=torch.bfloat16, device=CUDA) for size in sizes
    ]
    del blocks


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """Records the trace of every call to `select_backend`, which still decides."""
    record: list[Selection] = []

    def recorded(request: AttentionRequest, *arguments: Any, **options: Any) -> Selection:
        record.append(select_backend(request, *arguments, **options))
        return record[-1]

    monkeypatch.setattr(padless.dispatch, "select_backend", recorded)
    yield record


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_out_and_gradients_are_right(
    case: Case, backend: str, dtype: torch.dtype, selections: list[Selection]
) -> None:
    need(backend, case, dtype)
    assert_numbers_right(case, backend, dtype, CUDA)
    assert {selection.name for selection in selections} == {backend}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_dim_that_no_flash_kernel_takes_is_right(
    dtype: torch.dtype, selections: list[Selection]
) -> None:
    case = next(case for case in CASES if case.head_dim % 8)
    assert_numbers_right(case, "auto", dtype, CUDA)
    # In half precision heads are padded to a size that a flash kernel takes.
    assert all(
        selection.name == "sdpa"
        if dtype is torch.float32
        else (selection.name != "sdpa" and selection.head_dim % 8 == 0)
        for selection in selections
    )


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
@pytest.mark.parametrize("case", MASK_CASES, ids=str)
def test_exactly_the_right_keys_are_visible(case: Case, backend: str, dtype: torch.dtype) -> None:
    need(backend, case, dtype)
    assert_mask_right(case, backend, dtype, CUDA)


# FlashAttention-4 where it is installed and there is much to do, torch's kernel elsewhere; SDPA for
# what neither takes.
@pytest.mark.parametrize("much", [True, False], ids=["much", "little"])
@pytest.mark.parametrize(
    "dtype, head_dim, fused",
    [
        (torch.bfloat16, 128, True),
        (torch.float16, 64, True),
        (torch.float32, 128, False),
        (torch.bfloat16, 264, False),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_backend_that_serves(
    dtype: torch.dtype, head_dim: int, fused: bool, much: bool, selections: list[Selection]
) -> None:
    case = Case("auto", (5, 70), head_dim=head_dim)
    q, k, v = case.inputs(dtype, CUDA)
    with as_if_much_work() if much else nullcontext():
        out = case.attend(q, k, v, backend="auto")
    assert out.dtype == dtype
    assert out.isfinite().all()
    has_fa4 = much and fa4.reject(AttentionRequest.of(q, k, v)) is None
    first = "fa4" if has_fa4 else "torch_varlen"
    assert [selection.name for selection in selections] == [first if fused else "sdpa"]


@pytest.mark.parametrize("head_dim", [36, *FA4_WRONG])
def test_auto_is_right_where_a_fast_backend_is_not(
    head_dim: int, selections: list[Selection]
) -> None:
    case = Case("auto", (5, 0, 70, 129), head_dim=head_dim)
    with as_if_much_work():
        assert_numbers_right(case, "auto", torch.bfloat16, CUDA)
    assert {selection.name for selection in selections} != {"reference"}


@pytest.mark.parametrize("lengths", [(70, 1, 130, 64), (96, 96, 96, 96)], ids=["ragged", "equal"])
@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_other_sequences_are_bit_identical_when_one_is_poisoned(
    backend: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    case = Case("poisoned", lengths)
    need(backend, case, dtype)
    layout = VarlenLayout.from_lengths(lengths)
    # FlashAttention-4 multiplies values behind a sequence's end by weights of zero: what is not
    # finite there reaches it, what is finite does not.
    poison = 1e4 if backend == "fa4" else float("nan")
    inputs = case.inputs(dtype, CUDA)
    before = case.attend(*inputs, backend=backend)
    with torch.no_grad():
        for tensor in inputs:
            layout.split(tensor)[2].fill_(poison)
    after = case.attend(*inputs, backend=backend)
    for i, (one, other) in enumerate(zip(layout.split(before), layout.split(after), strict=True)):
        assert torch.equal(one, other) == (i != 2)
    dout = draw(*after.shape, seed=4, dtype=dtype, device=CUDA)
    for grad in torch.autograd.grad(after, inputs, dout):
        finite = [bool(piece.isfinite().all()) for piece in layout.split(grad)]
        assert finite == [True, True, backend == "fa4", True]


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_strided_inputs_equal_contiguous_ones(backend: str, dtype: torch.dtype) -> None:
    case = Case("strided", (70, 3, 64))
    need(backend, case, dtype)
    inputs = [x.detach() for x in case.inputs(dtype, CUDA)]
    expected = case.attend(*inputs, backend=backend)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    head_dim_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs]
    # No multiple of 16 bytes apart, or not beginning at one.
    odd_stride = [torch.cat([x, x[..., :1]], dim=-1)[..., :-1] for x in inputs]
    off = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs]
    for views in (heads_first, head_dim_first, odd_stride, off):
        got = case.attend(*views, backend=backend)
        # SDPA takes another kernel for some strides, which rounds elsewhere.
        near = max(4 * torch.finfo(dtype).eps, 1e-4)
        torch.testing.assert_close(got, expected, rtol=near, atol=near)


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_a_second_backward_gives_the_same_gradients(backend: str, dtype: torch.dtype) -> None:
    case = Case("twice", (70, 3, 64))
    need(backend, case, dtype)
    inputs = case.inputs(dtype, CUDA)
    out = case.attend(*inputs, backend=backend)
    # An expanded dout, as `sum` makes it.
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    for one, other in zip(first, second, strict=True):
        # dq is summed by atomics: the last bits may differ.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "torch_varlen", "sdpa"])
def test_no_token_and_no_key_are_answered(backend: str) -> None:
    empty = Case("empty", (0, 0))
    assert empty.attend(*empty.inputs(torch.bfloat16, CUDA), backend=backend).shape == (0, 6, 64)
    no_key = Case("no_key", (3, 2), (0, 0))
    q, k, v = no_key.inputs(torch.bfloat16, CUDA)
    out = no_key.attend(q, k, v, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


def test_layout_must_be_on_the_device_of_q() -> None:
    q = torch.zeros(3, 2, 8, device=CUDA)
    with pytest.raises(ValueError, match="cu_seqlens must be on q's device cuda:0, got cpu"):
        varlen_attention(q, q, q, VarlenLayout.from_lengths([3]))


@pytest.mark.parametrize("build", ["mask", "rows", "cu_seqlens", "position_ids"])
def test_layouts_from_cuda_tensors_stay_on_cuda(build: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=CUDA)
    layout = {
        "mask": lambda: VarlenLayout.from_mask(mask),
        "rows": lambda: VarlenLayout.from_rows(2, 3, device=CUDA),
        "cu_seqlens": lambda: VarlenLayout.from_cu_seqlens(torch.tensor([0, 2, 5], device=CUDA)),
        "position_ids": lambda: VarlenLayout.from_position_ids(mask.cumsum(1)),
    }[build]()
    assert layout.cu_seqlens.device.type == CUDA
    assert layout.cu_seqlens.dtype == torch.int32
    if build == "mask":
        padded = draw(2, 3, 4, seed=1, dtype=torch.float32, device=CUDA)
        assert torch.equal(layout.pad(layout.unpad(padded)), padded * mask[..., None])


# 32 heads of 128: from about 4096 sequences on an int does not reach over the scratch of
# FlashAttention-2's backward. Five hundred at a time are right by the grid above.
@pytest.mark.parametrize("backend", ["torch_varlen", "fa4", "fa2"])
def test_thousands_of_short_sequences_equal_some_hundred_at_a_time(backend: str) -> None:
    lengths = [1 + n % 7 for n in range(6000)]
    case = Case("thousands", tuple(lengths), num_heads=32, num_kv_heads=8, head_dim=128)
    need(backend, case, torch.bfloat16)
    inputs = case.inputs(torch.bfloat16, CUDA)
    dout = draw(*inputs[0].shape, seed=4, dtype=torch.bfloat16, device=CUDA)
    out = case.attend(*inputs, backend=backend)
    got = [out, *torch.autograd.grad(out, inputs, dout)]
    bounds = [0, *accumulate(lengths)]
    for first in range(0, 6000, 500):
        rows = slice(bounds[first], bounds[first + 500])
        part = [x[rows].detach().requires_grad_() for x in inputs]
        layout = VarlenLayout.from_lengths(lengths[first : first + 500], device=CUDA)
        part_out = varlen_attention(*part, layout, backend=backend)
        expected = [part_out, *torch.autograd.grad(part_out, part, dout[rows])]
        for one, other in zip(got, expected, strict=True):
            # dq is summed by atomics: the last bits may differ.
            torch.testing.assert_close(one[rows], other, rtol=2e-2, atol=2e-2)


# Both kernels of torch: the operator, and its own wrapper of it where it has one.
@pytest.mark.requires("torch.nn.attention.varlen")
@pytest.mark.parametrize(
    "case",
    # But for a window that is open on the right, which no FlashAttention-2 is asked for.
    [c for c in CASES if c.head_dim == 64 and c.name != "window_left_only"],
    ids=str,
)
def test_torchs_own_wrapper_is_called_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "_operator", lambda: (None, frozenset()))
    assert_numbers_right(case, "torch_varlen", torch.bfloat16, CUDA)
    assert_mask_right(case, "torch_varlen", torch.bfloat16, CUDA)
