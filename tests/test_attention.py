"""`varlen_attention` on the CPU: numbers, masks, independence of the sequences, and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import padless.dispatch
from attention_cases import CASES, Case, assert_mask_right, assert_numbers_right
from padless.answers import Selection
from padless.attention import varlen_attention
from padless.backends import sdpa
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import forget_selections, select_backend

BACKENDS = ("sdpa", "reference")
NAN = float("nan")


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """Records the trace of every call to `select_backend`, which still decides."""
    record: list[Selection] = []

    def recorded(request: AttentionRequest, *arguments: Any, **options: Any) -> Selection:
        record.append(select_backend(request, *arguments, **options))
        return record[-1]

    monkeypatch.setattr(padless.dispatch, "select_backend", recorded)
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
    assert [x.grad is not None for x in (q, k, v)] == [True] * 3


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
    *rejected, chosen = selections[0].trace
    assert chosen.name == "sdpa"
    assert {candidate.rejected for candidate in rejected} == {"needs CUDA, got cpu"}


def test_default_scale_is_that_of_the_definition() -> None:
    case = Case("default", (6, 3), head_dim=16)
    q, k, v = (x.detach() for x in case.inputs(torch.float32))
    given = case.attend(q, k, v, backend="sdpa", softmax_scale=0.25)
    assert torch.equal(case.attend(q, k, v, backend="sdpa"), given)


# A request says whether gradients will be asked for, what the mask is and whether to repeat.
@pytest.mark.parametrize("takes_grad", [0, 1, 2, None], ids=["q", "k", "v", "none"])
def test_a_backend_is_asked_for_what_the_call_needs(
    takes_grad: int | None, selections: list[Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AttentionRequest] = []
    monkeypatch.setattr(sdpa, "reject", lambda request: asked.append(request))
    case = Case("asked", (3, 2), num_heads=4, head_dim=16, causal=False, window_size=(2, 1))
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    if takes_grad is not None:
        inputs[takes_grad].requires_grad_()
    forget_selections()
    case.attend(*inputs, backend="sdpa", deterministic=True)
    with torch.no_grad():
        case.attend(*inputs, backend="sdpa", deterministic=False)
    expected = AttentionRequest(
        torch.device("cpu"), torch.float32, 16, 4, 2, False, (2, 1), True, takes_grad is not None
    )
    assert asked == [expected, replace(expected, deterministic=False, needs_grad=False)]
    forget_selections()


def test_determinism_is_by_default_what_torch_is_told(selections: list[Selection]) -> None:
    seen: list[bool] = []

    def recorded(*tensors: Any, deterministic: bool, **options: Any) -> Tensor:
        seen.append(deterministic)
        return sdpa.varlen(*tensors, deterministic=deterministic, **options)

    case = Case("told", (3, 2), head_dim=16)
    inputs = case.inputs(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padless.dispatch, "adapter", lambda name: SimpleNamespace(varlen=recorded))
        case.attend(*inputs, backend="sdpa")
        try:
            torch.use_deterministic_algorithms(True)
            case.attend(*inputs, backend="sdpa")
            case.attend(*inputs, backend="sdpa", deterministic=False)
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_bit_for_bit_when_asked(backend: str) -> None:
    case = Case("repeat", (33, 7, 33), head_dim=32)
    inputs = case.inputs(torch.bfloat16)
    runs = [
        torch.autograd.grad(
            case.attend(*inputs, backend=backend, deterministic=True).square().sum(), inputs
        )
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


# A float32 layer inside autocast stays one, forward and backward.
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_dtype_that_is_computed_in(backend: str) -> None:
    case = Case("autocast", (9, 4), head_dim=16)
    inputs = case.inputs(torch.float32)
    expected = case.attend(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.attend(*inputs, backend=backend)
    assert torch.equal(out, expected)


def test_a_list_is_a_window_too() -> None:
    case = Case("list", (5, 9), head_dim=16, window_size=(2, None))
    q, k, v = (x.detach() for x in case.inputs(torch.float32))
    layout = VarlenLayout.from_lengths(case.seqlens_q)
    out = varlen_attention(q, k, v, layout, window_size=[2, None], backend="sdpa")  # type: ignore[arg-type]
    assert torch.equal(out, case.attend(q, k, v, backend="sdpa"))
