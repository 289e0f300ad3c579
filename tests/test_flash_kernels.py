"""Every flash backend by way of `varlen_attention`; stand-ins as strict as the kernels need no GPU.

The grid, the mask probe and the gradients are those that a GPU runs on the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from kernel_stand_ins import forget, install
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout
from padless.selection import adapter

KERNELS = (
    "fa4",
    "fa4_early",
    "fa3",
    "fa3_early",
    "fa2",
    "fa2_early",
    "fa1",
    "aten",
    "varlen_flag",
    "varlen_window",
    "varlen_gqa",
)
FLASH_CASES = tuple(case for case in CASES if case.head_dim % 8 == 0)


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Installs a stand-in; gives the name of the backend that calls it."""
    yield install(monkeypatch, request.param)
    monkeypatch.undo()
    forget()


def rejected(case: Case, backend: str) -> str:
    """Asks the adapter itself whether it takes the case."""
    q, k, v = case.inputs(torch.bfloat16)
    layouts = [VarlenLayout.from_lengths(lengths) for lengths in (case.seqlens_q, case.keys)]
    request = AttentionRequest.of(q, k, v, causal=case.causal, window_size=case.window_size)
    module = adapter(backend)
    on_layout = getattr(module, "reject_layout", lambda *_: None)
    return module.reject(request) or on_layout(request, *layouts) or ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_out_and_gradients_are_right(case: Case, dtype: torch.dtype, backend: str) -> None:
    if reason := rejected(case, backend):
        with pytest.raises(BackendUnavailableError) as caught:
            case.attend(*case.inputs(dtype), backend=backend)
        assert str(caught.value).endswith(f": {backend}: {reason}")
    else:
        assert_numbers_right(case, backend, dtype)


@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_exactly_the_right_keys_are_visible(case: Case, backend: str) -> None:
    if not rejected(case, backend):
        assert_mask_right(case, backend, torch.bfloat16)


# What stays unserved is what the kernel really cannot do, and no more of the grid than that.
@pytest.mark.parametrize(
    "kernel, served",
    [
        ("fa4", len(FLASH_CASES)),
        ("fa3", len(FLASH_CASES)),
        ("fa2", len(FLASH_CASES) - 1),
        ("aten", len(FLASH_CASES) - 1),
        ("varlen_flag", sum(case.window_size == (None, None) for case in FLASH_CASES)),
        ("fa1", sum(case.num_heads == case.num_kv_heads for case in FLASH_CASES)),
    ],
)
def test_as_much_of_the_grid_is_served_as_the_kernel_allows(
    kernel: str, served: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install(monkeypatch, kernel)
    assert sum(not rejected(case, name) for case in FLASH_CASES) == served
    monkeypatch.undo()
    forget()


def strided(tensor: Tensor, how: str) -> Tensor:
    """Copies a packed tensor into strides, or to an address, that not every kernel takes."""
    if how == "head_dim_first":
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if how == "off_16_bytes":
        flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
        return flat[1:].view(tensor.shape)
    wider = torch.cat([tensor, tensor[..., :1]], dim=-1)
    return wider[..., : tensor.shape[-1]]


# Four queries a KV head, equal lengths and no causal mask: what every kernel takes, but for fa1.
@pytest.mark.parametrize("how", ["head_dim_first", "off_16_bytes", "odd_stride"])
def test_strides_that_a_kernel_refuses_are_made_good(how: str, backend: str) -> None:
    heads = 4 if backend == "fa1" else 1
    case = Case("strided", (3, 2), num_heads=4, num_kv_heads=heads, head_dim=16)
    inputs = [x.detach() for x in case.inputs(torch.bfloat16)]
    views = [strided(x, how) for x in inputs]
    assert all(torch.equal(one, other) for one, other in zip(views, inputs, strict=True))
    assert torch.equal(case.attend(*views, backend=backend), case.attend(*inputs, backend=backend))


# At one query each FlashAttention-2 reshapes q by the number of sequences: it has to be theirs.
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
@pytest.mark.parametrize("seqlens_q", [(1, 1, 1), (1, 0, 1)], ids=["all", "one_without"])
def test_one_query_each_is_served_also_where_a_sequence_has_none(
    seqlens_q: tuple[int, ...], causal: bool, backend: str
) -> None:
    case = Case("step", seqlens_q, (5, 4, 2), head_dim=16, causal=causal)
    if not rejected(case, backend):
        assert_numbers_right(case, backend, torch.bfloat16)
