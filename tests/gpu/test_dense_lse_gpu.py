"""The memory-efficient operators below SDPA: lse and gradients of a share, on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from varlen_gpu_cases import CUDA, GPU_CASES

from accuracy import draw
from attention_cases import Case
from padless import dispatch
from padless.backends import reference, sdpa
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

pytestmark = pytest.mark.gpu

NEAR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Lengths on both sides of 32, to which rows of lse are filled up, and of the kernel's tiles.
SERVED = tuple(
    case
    for case in (
        *GPU_CASES,
        Case("lse_rows", (31, 32, 33, 1, 64)),
        Case("lse_rows_not_causal", (31, 32, 33, 1), (70, 5, 1, 200), causal=False),
    )
    if case.window_size == (None, None) and (not case.causal or case.keys == case.seqlens_q)
)


def _layouts(case: Case) -> tuple[VarlenLayout, VarlenLayout]:
    made = (VarlenLayout.from_lengths(n, device=CUDA) for n in (case.seqlens_q, case.keys))
    return next(made), next(made)


def _assert_near(name: str, got: Tensor, want: Tensor, near: float) -> None:
    assert not got.isnan().any(), name
    scale = max(1.0, float(want[want.isfinite()].abs().max()))
    torch.testing.assert_close(
        got.double(), want, rtol=near, atol=near * scale, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_out_lse_and_gradients_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    layouts = _layouts(case)
    options: dict[str, Any] = {"causal": case.causal, "softmax_scale": case.scale}
    inputs = [x.detach() for x in case.inputs(dtype, CUDA)]
    exact = [x.double() for x in inputs]
    request = AttentionRequest.of(*inputs, causal=case.causal)
    assert sdpa.reject_lse(request, *layouts) is None
    out, lse = sdpa.varlen_with_lse(*inputs, *layouts, **options)
    true_out, true_lse = reference.varlen_with_lse(*exact, *layouts, **options)
    assert (lse.dtype, lse.shape) == (torch.float32, true_lse.shape)
    _assert_near("out", out, true_out, NEAR[dtype])
    _assert_near("lse", lse, true_lse, 1e-3 if dtype != torch.float32 else NEAR[dtype])
    dout = draw(*out.shape, seed=4, dtype=dtype, device=CUDA)
    other = draw(*out.shape, seed=5, dtype=torch.float64, device=CUDA)
    for share in (1.0, 0.3):
        whole_lse = true_lse - torch.tensor(share, dtype=torch.float64).log()
        whole_out = (share * true_out + (1 - share) * other).to(dtype)
        found = sdpa.gradients(dout, *inputs, whole_out, whole_lse.float(), *layouts, **options)
        expected = reference.gradients(
            dout.double(), *exact, whole_out.double(), whole_lse, *layouts, **options
        )
        for name, got, want in zip(("dq", "dk", "dv"), found, expected, strict=True):
            assert got.dtype == dtype
            _assert_near(f"{name} of a share of {share}", got, want, NEAR[dtype])


def test_auto_takes_them_in_float32_and_never_waits() -> None:
    case = Case("no_wait", (70, 3, 64, 3, 70))
    q, k, v = (x.detach() for x in case.inputs(torch.float32, CUDA))
    layouts = _layouts(case)
    request = AttentionRequest.of(q, k, v)
    plan = dispatch.plan_call(request, "auto", *layouts, needs_lse=True)
    assert plan.selection.name == "sdpa"
    options: dict[str, Any] = {"causal": True, "softmax_scale": case.scale}

    def step() -> None:
        out, lse = dispatch.run_with_lse(plan, q, k, v, options)
        dispatch.gradients(plan, (torch.ones_like(q), q, k, v, out), lse, options)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_repeat_where_torch_is_told_so() -> None:
    case = Case("repeats", (300, 129), num_heads=8, num_kv_heads=2, head_dim=128)
    q, k, v = (x.detach() for x in case.inputs(torch.float32, CUDA))
    layouts = _layouts(case)
    options: dict[str, Any] = {"causal": True, "softmax_scale": case.scale}
    out, lse = sdpa.varlen_with_lse(q, k, v, *layouts, **options)
    dout = torch.ones_like(q)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            sdpa.gradients(dout, q, k, v, out, lse, *layouts, **options) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_view_that_begins_at_any_number_is_copied() -> None:
    # The kernel loads 16 bytes at a time, and its error would end the use of CUDA in this process.
    layout = VarlenLayout.from_lengths([33], device=CUDA)
    rows = torch.randn(33 * 4 * 64 + 1, device=CUDA)[1:].view(33, 4, 64)
    options: dict[str, Any] = {"causal": True, "softmax_scale": 0.125}
    out, lse = sdpa.varlen_with_lse(rows, rows, rows, layout, layout, **options)
    expected, _ = reference.varlen_with_lse(rows, rows, rows, layout, layout, **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    sdpa.gradients(rows, rows, rows, rows, out, lse, layout, layout, **options)
    torch.cuda.synchronize()
