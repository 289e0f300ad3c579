"""SDPA's operators with the logarithms of their sums: the definition's, and only where they are.

Measured against the reference, whose own are measured by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accuracy import draw
from attention_cases import CASES, Case
from padless import dispatch
from padless.backends import dense_lse, reference, sdpa
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def _is_served(case: Case) -> bool:
    return case.window_size == (None, None) and (not case.causal or case.keys == case.seqlens_q)


def _layouts(case: Case) -> tuple[VarlenLayout, VarlenLayout]:
    return VarlenLayout.from_lengths(case.seqlens_q), VarlenLayout.from_lengths(case.keys)


def _request(case: Case, dtype: torch.dtype, other: dict[str, Any] | None = None) -> Any:
    q, k, v = case.inputs(dtype)
    made = AttentionRequest.of(q, k, v, causal=case.causal, window_size=case.window_size)
    return replace(made, **(other or {}))


def _assert_near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.isnan().sum() == 0, name
    near = NEAR[dtype]
    scale = max(1.0, float(want[want.isfinite()].abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want, rtol=near, atol=near * scale, msg=lambda m: f"{name}: {m}"
    )


def check(case: Case, dtype: torch.dtype, on: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Compares out and lse, and gradients for the call alone and as a share of more keys."""
    layouts = _layouts(case)
    options = {"causal": case.causal, "softmax_scale": case.scale}
    inputs = [x.detach() for x in case.inputs(dtype)]
    exact = [x.double() for x in inputs]
    out, lse = sdpa.varlen_with_lse(*map(on, inputs), *layouts, **options)
    true_out, true_lse = reference.varlen_with_lse(*exact, *layouts, **options)
    assert (out.dtype, out.shape) == (dtype, true_out.shape)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _assert_near("out", out, true_out, dtype)
    _assert_near("lse", lse, true_lse, torch.float32 if dtype == torch.bfloat16 else dtype)
    dout = draw(*out.shape, seed=4, dtype=dtype)
    # Of other keys whose weights make out and lse those of more: the second is the ring's.
    other = draw(*out.shape, seed=5, dtype=torch.float64)
    for share in (1.0, 0.3):
        whole_lse = true_lse - torch.tensor(share, dtype=torch.float64).log()
        whole_out = (share * true_out + (1 - share) * other).to(dtype)
        found = sdpa.gradients(
            on(dout), *map(on, inputs), on(whole_out), on(whole_lse.to(lse.dtype)), *layouts,
            **options,
        )  # fmt: skip
        expected = reference.gradients(
            dout.double(), *exact, whole_out.double(), whole_lse, *layouts, **options
        )
        for name, got, want in zip(("dq", "dk", "dv"), found, expected, strict=True):
            assert got.dtype == dtype
            _assert_near(f"{name} of a share of {share}", got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if _is_served(c)], ids=str)
def test_out_lse_and_gradients_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert sdpa.reject_lse(_request(case, dtype), *_layouts(case)) is None
    check(case, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if not _is_served(c)], ids=str)
def test_what_is_aligned_otherwise_is_left_to_the_reference(case: Case) -> None:
    request, layouts = _request(case, torch.float32), _layouts(case)
    with pytest.raises(BackendUnavailableError, match="sdpa: logarithms of its sums: gives them"):
        dispatch.plan_call(request, "sdpa", *layouts, needs_lse=True)
    plan = dispatch.plan_call(request, "auto", *layouts, needs_lse=True)
    assert plan.selection.name == "reference"


def test_auto_takes_them_before_the_reference() -> None:
    case = Case("auto", (5, 9))
    for dtype in DTYPES:
        plan = dispatch.plan_call(_request(case, dtype), "auto", *_layouts(case), needs_lse=True)
        assert plan.selection.name == "sdpa"
    plan = dispatch.plan_call(
        _request(case, torch.float16), "auto", *_layouts(case), needs_lse=True
    )
    assert plan.selection.name == "reference"


@pytest.mark.parametrize("which", ["forward", "backward", "schema"])
def test_a_torch_with_other_operators_is_passed_over(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *schemas = dense_lse._SCHEMAS["cpu"]
    if which == "schema":
        schemas[1] = schemas[1].replace("logsumexp", "lse")
    missing = name if which != "forward" else "_of_another_name"
    monkeypatch.setitem(dense_lse._SCHEMAS, "cpu", (missing, *schemas))
    if which == "backward":
        schemas[0] = "query key"
        monkeypatch.setitem(dense_lse._SCHEMAS, "cpu", ("sin", "self | self", "self"))
    dense_lse._operators.cache_clear()
    case = Case("other", (5,))
    reason = sdpa.reject_lse(_request(case, torch.float32), *_layouts(case))
    assert reason == f"torch {torch.__version__} has no operator that gives them on cpu"
    monkeypatch.undo()
    dense_lse._operators.cache_clear()


def test_the_operators_on_cuda_are_the_ones_that_are_known() -> None:
    # Their schemas are there without a GPU.
    assert dense_lse._operators("cuda") is not None
    assert dense_lse._operators("mps") is None


def test_groups_are_dense_batches_and_neighbours_are_not_copied() -> None:
    layout = VarlenLayout.from_lengths([4, 4, 3, 0, 4, 1])
    fours, three, one = dense_lse._parts(layout, layout)
    assert fours.shape == (3, 4, 4) and isinstance(fours.queries, Tensor)
    assert (three.queries, one.queries) == (slice(8, 11), slice(15, 16))
    assert dense_lse._parts(layout, layout) is dense_lse._parts(layout, layout)
    same = VarlenLayout.from_lengths([4, 4, 0, 4])
    assert [part.queries for part in dense_lse._parts(same, same)] == [slice(0, 12)]


def test_batches_end_where_the_grid_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_lse, "_MOST_SEQUENCES", 2)
    layout = VarlenLayout.from_lengths([3] * 5)
    assert [part.shape[0] for part in dense_lse._parts(layout, layout)] == [2, 2, 1]
    check(Case("chunks", (3,) * 5), torch.float64)


class OnCuda(Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


def _stand_ins() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operators of CUDA by those of the CPU, with what they ask of their arguments."""
    found = dense_lse._operators("cpu")
    assert found is not None
    forward, backward = found

    def plain(*tensors: Tensor) -> list[Tensor]:
        heads, head_dim = tensors[0].shape[1], tensors[0].shape[3]
        for x in tensors:
            assert (x.shape[1], x.shape[3]) == (heads, head_dim), "no groups of heads"
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
            assert all(n * x.element_size() % 16 == 0 for n in x.stride()[:-1])
        return [x.as_subclass(Tensor) for x in tensors]

    def efficient(
        q: Tensor, k: Tensor, v: Tensor, bias: None, lse: bool, dropout: float, causal: bool,
        *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert lse and bias is None and dropout == 0.0
        out, sums = forward(*plain(q, k, v), 0.0, causal, scale=scale)
        # Memory behind the rows is there, and holds anything.
        sums = F.pad(sums, (0, -sums.shape[2] % 32), value=float("nan"))
        return out, sums, torch.zeros(()), torch.zeros(())

    def efficient_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, lse: Tensor,
        seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool], causal: bool,
        *, scale: float,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        assert wanted == [True, True, True, False] and bias is None and dropout == 0.0
        assert seed.dtype == offset.dtype == torch.int64 and seed.device.type == "cpu"
        rows = q.shape[2]
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        assert lse.shape == (*q.shape[:2], -(-rows // 32) * 32)
        assert (lse[..., rows:] == float("inf")).all(), "rows that are not there"
        tensors = plain(dout, q, k, v, out)
        sums = lse[..., :rows].as_subclass(Tensor).contiguous()
        return *backward(*tensors, sums, 0.0, causal, scale=scale), None

    return efficient, efficient_backward


@pytest.mark.parametrize(
    "case", [c for c in CASES if _is_served(c) and c.head_dim % 8 == 0], ids=str
)
def test_what_cuda_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = _stand_ins()
    monkeypatch.setattr(dense_lse, "_operators", lambda kind: {"cuda": stand_ins}[kind])

    def on_cuda(x: Tensor) -> Tensor:
        return x.as_subclass(OnCuda)

    check(case, torch.float32, on_cuda)


@pytest.mark.parametrize(
    ("other", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({}, (7, 5), None),
        ({"dtype": torch.float64}, (9, 0), "in torch.float32, torch.float16, torch.bfloat16 alone"),
        ({"dtype": torch.bfloat16}, (8, 0), None),
        ({"dtype": torch.bfloat16}, (7, 5), "from compute capability 8.0 on"),
        ({"head_dim": 34}, (9, 0), "heads of a multiple of 16 bytes"),
        ({"deterministic": True, "needs_grad": False}, (9, 0), None),
        ({"deterministic": True}, (9, 0), "repeats its gradients under"),
    ],
    ids=str,
)
def test_what_cuda_is_not_asked(
    other: dict[str, Any],
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    case = Case("cuda", (5, 3))
    made = {"device": torch.device("cuda", 0), "needs_grad": True, **other}
    found = sdpa.reject_lse(_request(case, torch.float32, made), *_layouts(case))
    assert (found is None) if reason is None else (reason in str(found))
