"""`varlen_attention` on the CPU: numbers, masks, independence of the sequences, and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import padless.attention
from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from padless.attention import varlen_attention
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import Selection, select_backend

BACKENDS = ("sdpa", "reference")
NAN = float("nan")


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """Records the trace of every call to `select_backend`, which still decides."""
    record: list[Selection] = []

    def recorded(request: AttentionRequest, backend: str = "auto") -> Selection:
        record.append(select_backend(request, backend))
        return record[-1]

    monkeypatch.setattr(padless.attention, "select_backend", recorded)
    yield record


# float32 shows faults in their full size; the half types show what a kernel keeps in float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_and_gradients_are_right(
    case: Case, backend: str, dtype: torch.dtype, selections: list[Selection]
) -> None:
    assert_numbers_right(case, backend, dtype)
    assert [selection.name for selection in selections] == [backend]


# The mask does not depend on the numbers: two dtypes, because kernels differ by dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exactly_the_right_keys_are_visible(
    case: Case, backend: str, dtype: torch.dtype, selections: list[Selection]
) -> None:
    assert_mask_right(case, backend, dtype)
    assert {selection.name for selection in selections} == {backend}


# Ragged lengths run one call a sequence, equal ones a single call for all.
@pytest.fixture(params=[(4, 1, 7, 3), (5, 5, 5, 5)], ids=["ragged", "equal"])
def case(request: pytest.FixtureRequest) -> Case:
    """Four sequences to change one of."""
    return Case("four", request.param, num_heads=4, head_dim=16)


@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e4, 0.5])
@pytest.mark.parametrize("changed", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_sequences_are_bit_identical_when_one_changes(
    case: Case, backend: str, changed: int, poison: float
) -> None:
    q, k, v = (x.detach() for x in case.inputs(torch.float32))
    before = case.attend(q, k, v, backend=backend)
    layout = VarlenLayout.from_lengths(case.seqlens_q)
    for tensor in (q, k, v):
        layout.split(tensor)[changed].fill_(poison)
    after = case.attend(q, k, v, backend=backend)
    for i, (one, other) in enumerate(zip(layout.split(before), layout.split(after), strict=True)):
        assert torch.equal(one, other) == (i != changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_in_the_sequence_of_the_loss(case: Case, backend: str) -> None:
    inputs = case.inputs(torch.float32)
    layout = VarlenLayout.from_lengths(case.seqlens_q)
    out = case.attend(*inputs, backend=backend)
    grads = torch.autograd.grad(layout.split(out)[2].square().sum(), inputs)
    for grad in grads:
        assert [bool(piece.any()) for piece in layout.split(grad)] == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_a_loop_over_the_sequences(
    case: Case, backend: str, dtype: torch.dtype
) -> None:
    q, k, v = (x.detach() for x in case.inputs(dtype))
    layout = VarlenLayout.from_lengths(case.seqlens_q)
    alone = [
        varlen_attention(q_i, k_i, v_i, VarlenLayout.from_lengths([len(q_i)]), backend=backend)
        for q_i, k_i, v_i in zip(layout.split(q), layout.split(k), layout.split(v), strict=True)
    ]
    torch.testing.assert_close(case.attend(q, k, v, backend=backend), torch.cat(alone))


def test_a_cache_before_the_queries_equals_the_last_rows_of_the_whole() -> None:
    whole = Case("whole", (9, 6), head_dim=16)
    q, k, v = (x.detach() for x in whole.inputs(torch.float32))
    last = torch.tensor([6, 7, 8, 14])
    step = Case("step", (3, 1), (9, 6), head_dim=16)
    got = step.attend(q[last], k, v, backend="sdpa")
    torch.testing.assert_close(got, whole.attend(q, k, v, backend="sdpa")[last])


def strided(tensor: Tensor, how: str) -> Tensor:
    """Copies a packed tensor into other strides."""
    if how == "heads_first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "head_dim_first":
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if how == "fused_slice":
        return torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]]
    return tensor.repeat_interleave(2, dim=0)[::2]


@pytest.mark.parametrize("how", ["heads_first", "head_dim_first", "fused_slice", "every_other_row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(case: Case, backend: str, how: str) -> None:
    inputs = case.inputs(torch.float32)
    expected = case.attend(*inputs, backend=backend)
    dout = torch.ones_like(expected)
    views = [strided(x.detach(), how).requires_grad_() for x in inputs]
    assert not any(view.is_contiguous() for view in views)
    got = case.attend(*views, backend=backend)
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got, views, dout),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_through_one_graph_adds_the_same_gradients(
    case: Case, backend: str
) -> None:
    inputs = case.inputs(torch.float32)
    out = case.attend(*inputs, backend=backend)
    out.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs if x.grad is not None]
    out.sum().backward()
    for x, once in zip(inputs, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_token_at_all_gives_an_empty_output(lengths: tuple[int, ...], backend: str) -> None:
    case = Case("empty", lengths, head_dim=16)
    q, k, v = case.inputs(torch.float32)
    out = case.attend(q, k, v, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None


# No key for any query is answered before a backend is asked; no key for those queries that there
# are, while another sequence has keys and no query, is each backend's own matter.
@pytest.mark.parametrize("keys", [(0, 0), (0, 3)], ids=["no_key_anywhere", "keys_elsewhere"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_queries_without_a_key_give_zeros_and_zero_gradients(
    keys: tuple[int, int], causal: bool, backend: str
) -> None:
    case = Case("no_key", (2, 0), keys, head_dim=16, causal=causal)
    q, k, v = case.inputs(torch.float32)
    out = case.attend(q, k, v, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_before_the_first_key_give_zeros_even_from_nan(backend: str) -> None:
    case = Case("more_queries", (5, 4), (2, 4), head_dim=16)
    q, k, v = (x.detach() for x in case.inputs(torch.float32))
    q[:3] = NAN
    out = case.attend(q, k, v, backend=backend)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_auto_takes_sdpa_on_the_cpu(
    case: Case, dtype: torch.dtype, selections: list[Selection]
) -> None:
    out = case.attend(*case.inputs(dtype), backend="auto")
    assert out.dtype == dtype
    assert [selection.name for selection in selections] == ["sdpa"]
    assert [candidate.name for candidate in selections[0].trace] == ["torch_varlen", "sdpa"]


def test_default_scale_is_that_of_the_definition() -> None:
    case = Case("default", (6, 3), head_dim=16)
    q, k, v = (x.detach() for x in case.inputs(torch.float32))
    given = case.attend(q, k, v, backend="sdpa", softmax_scale=0.25)
    assert torch.equal(case.attend(q, k, v, backend="sdpa"), given)
