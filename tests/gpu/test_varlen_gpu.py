"""`varlen_attention` on CUDA: numbers, masks, isolation, and who serves which dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import padless.attention
from accuracy import draw
from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from padless.attention import varlen_attention
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import Selection, select_backend

pytestmark = pytest.mark.gpu

CUDA = "cuda"
# float32 has no fused kernel of this kind: torch_varlen rejects it and sdpa serves it.
SERVED = [
    ("torch_varlen", torch.bfloat16),
    ("torch_varlen", torch.float16),
    ("sdpa", torch.bfloat16),
    ("sdpa", torch.float16),
    ("sdpa", torch.float32),
]

# Beside the CPU's cases: every size of head that kernels are built for and some between (72, 80),
# lengths on both sides of the tiles of 64, 128 and 256, one query a sequence (where the kernel
# takes grouped heads for queries) with and without a sequence that has none, and rows long enough
# for several tiles in both directions.
GPU_CASES = (
    *(case for case in CASES if case.head_dim % 8 == 0),
    *(Case(f"head_dim_{d}", (70, 0, 131), head_dim=d) for d in (16, 72, 80, 192, 256)),
    Case("mha_128", (127, 1, 129), num_heads=4, num_kv_heads=4, head_dim=128),
    Case("tiles_more_keys", (63, 128, 1, 65), (300, 129, 257, 65), num_heads=8, head_dim=128),
    Case("tiles_more_queries", (300, 129, 70), (63, 128, 70), num_heads=8),
    Case("empty_first_and_last", (0, 140, 0), (5, 140, 0)),
    Case("one_query_each", (1, 1, 1, 1), (300, 1, 64, 129)),
    Case("one_query_each_not_causal", (1, 1, 1, 1), (300, 1, 64, 129), causal=False),
    Case("one_query_or_none", (1, 0, 1), (300, 5, 64)),
    Case("one_query_or_none_not_causal", (1, 0, 1), (300, 5, 64), causal=False),
    Case("long_ragged", (1023, 257, 1, 2049, 0, 511), num_heads=4, head_dim=128),
    Case("long_not_causal", (700, 33), (1025, 511), num_heads=4, causal=False),
)
MASK_CASES = tuple(case for case in GPU_CASES if sum(case.keys) <= 1000)


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

    def recorded(request: AttentionRequest, backend: str = "auto") -> Selection:
        record.append(select_backend(request, backend))
        return record[-1]

    monkeypatch.setattr(padless.attention, "select_backend", recorded)
    yield record


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_out_and_gradients_are_right(
    case: Case, backend: str, dtype: torch.dtype, selections: list[Selection]
) -> None:
    assert_numbers_right(case, backend, dtype, CUDA)
    assert {selection.name for selection in selections} == {backend}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_dim_that_only_sdpa_takes_is_right(
    dtype: torch.dtype, selections: list[Selection]
) -> None:
    case = next(case for case in CASES if case.head_dim % 8)
    assert_numbers_right(case, "auto", dtype, CUDA)
    assert {selection.name for selection in selections} == {"sdpa"}


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
@pytest.mark.parametrize("case", MASK_CASES, ids=str)
def test_exactly_the_right_keys_are_visible(case: Case, backend: str, dtype: torch.dtype) -> None:
    assert_mask_right(case, backend, dtype, CUDA)


@pytest.mark.parametrize(
    "dtype, head_dim, expected",
    [
        (torch.bfloat16, 128, "torch_varlen"),
        (torch.float16, 64, "torch_varlen"),
        (torch.float32, 128, "sdpa"),
        (torch.bfloat16, 36, "sdpa"),
        (torch.bfloat16, 264, "sdpa"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_backend_that_serves(
    dtype: torch.dtype, head_dim: int, expected: str, selections: list[Selection]
) -> None:
    case = Case("auto", (5, 70), head_dim=head_dim)
    out = case.attend(*case.inputs(dtype, CUDA), backend="auto")
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert [selection.name for selection in selections] == [expected]
    assert selections[0].trace[0].name == "torch_varlen"


@pytest.mark.parametrize("lengths", [(70, 1, 130, 64), (96, 96, 96, 96)], ids=["ragged", "equal"])
@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_other_sequences_are_bit_identical_when_one_is_nan(
    backend: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    case = Case("poisoned", lengths)
    layout = VarlenLayout.from_lengths(lengths)
    inputs = case.inputs(dtype, CUDA)
    before = case.attend(*inputs, backend=backend)
    with torch.no_grad():
        for tensor in inputs:
            layout.split(tensor)[2].fill_(float("nan"))
    after = case.attend(*inputs, backend=backend)
    for i, (one, other) in enumerate(zip(layout.split(before), layout.split(after), strict=True)):
        assert torch.equal(one, other) == (i != 2)
    dout = draw(*after.shape, seed=4, dtype=dtype, device=CUDA)
    for grad in torch.autograd.grad(after, inputs, dout):
        finite = [bool(piece.isfinite().all()) for piece in layout.split(grad)]
        assert finite == [True, True, False, True]


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_strided_inputs_equal_contiguous_ones(backend: str, dtype: torch.dtype) -> None:
    case = Case("strided", (70, 3, 64))
    inputs = [x.detach() for x in case.inputs(dtype, CUDA)]
    expected = case.attend(*inputs, backend=backend)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    head_dim_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs]
    for views in (heads_first, head_dim_first):
        assert not any(view.is_contiguous() for view in views)
        got = case.attend(*views, backend=backend)
        # SDPA takes another kernel for some strides, which rounds elsewhere.
        near = max(4 * torch.finfo(dtype).eps, 1e-4)
        torch.testing.assert_close(got, expected, rtol=near, atol=near)


@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_a_second_backward_gives_the_same_gradients(backend: str, dtype: torch.dtype) -> None:
    case = Case("twice", (70, 3, 64))
    inputs = case.inputs(dtype, CUDA)
    out = case.attend(*inputs, backend=backend)
    # An expanded dout, as `sum` makes it.
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    for one, other in zip(first, second, strict=True):
        # dq is summed by atomics: the last bits may differ.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


# More keys than queries is where sdpa builds a mask.
@pytest.mark.parametrize("keys", [(70, 3, 64), (90, 3, 200)], ids=["square", "more_keys"])
@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_a_call_never_waits_for_the_gpu(
    backend: str, dtype: torch.dtype, keys: tuple[int, ...]
) -> None:
    case = Case("no_wait", (70, 3, 64), keys)
    q, k, v = case.inputs(dtype, CUDA)
    layout = VarlenLayout.from_lengths(case.seqlens_q, device=CUDA)
    layout_k = VarlenLayout.from_lengths(case.keys, device=CUDA)
    dout = torch.ones_like(q)

    def step() -> None:
        out = varlen_attention(q, k, v, layout, layout_k=layout_k, backend=backend)
        torch.autograd.grad(out, (q, k, v), dout)

    step()  # what is loaded or planned on the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
