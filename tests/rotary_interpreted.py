"""The rotary kernel on the CPU, in Triton's interpreter.

Triton decides at import whether it interprets, so `test_rotary_kernel.py` runs this file in a
process of its own; pytest does not collect it by name.
"""

from __future__ import annotations

import os

import pytest
import torch

import rotary_cases
from accuracy import draw
from kernel_launches import count_launches
from padless.kernels import rotary, rotary_torch, rotary_triton
from rotary_cases import INTERPRETED, RotaryCase

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_rotary_kernel.py"

# Where a GPU rounds to the nearest bfloat16, the interpreter cuts off.
DTYPES = {torch.float32: 0.5, torch.bfloat16: 1.0}


@pytest.fixture(autouse=True)
def kernel_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has Triton rotate on the CPU, and records the grid of every launch."""
    monkeypatch.setattr(rotary, "_reject_triton", lambda q: None)
    return count_launches(monkeypatch, rotary_triton, "_rotary_kernel")


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_outputs_and_gradients_are_right_by_one_launch_each(
    case: RotaryCase, dtype: torch.dtype, inplace: bool, kernel_launches: list[tuple[int, ...]]
) -> None:
    rotary_cases.assert_case_right(case, dtype, inplace=inplace, ulps=DTYPES[dtype])
    assert len(kernel_launches) == (2 if case.total else 0)
    assert {grid[0] for grid in kernel_launches} <= {case.total}


@pytest.mark.parametrize("transposed", [False, True], ids=["ahead", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_twin_to_a_rounding(dtype: torch.dtype, transposed: bool) -> None:
    q, k, cos, sin = RotaryCase("twin", 4, 33, 3, 72).inputs(dtype)
    ours, twins = ([torch.empty_like(x) for x in (q, k)] for _ in range(2))
    rotary_triton.rotate(q, k, *ours, cos[0], sin[0], transposed=transposed)
    rotary_torch.rotate(q, k, *twins, cos[0], sin[0], transposed=transposed)
    for one, other in zip(ours, twins, strict=True):
        near = torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=near, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_rotated_and_nothing_beside_them(dtype: torch.dtype) -> None:
    rotary_cases.assert_strided_right(dtype, ulps=DTYPES[dtype])


def test_inputs_strided_in_the_last_dimension_are_rotated_elsewhere() -> None:
    rotary_cases.assert_last_dimension_strided_right()


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("which", ["q", "k"])
def test_one_gradient_or_one_output_alone(which: str, inplace: bool) -> None:
    rotary_cases.assert_one_gradient_right(which, inplace=inplace)
    rotary_cases.assert_one_output_used_right(which, inplace=inplace)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_version_counter_counts_the_write(grad: bool) -> None:
    q, k, cos, sin = RotaryCase("version", 5, 3, 2, 8).inputs(torch.float32)
    q = q.requires_grad_(grad) * 1
    with torch.set_grad_enabled(grad), rotary_cases.version_bumped(q, k):
        outs = rotary.apply_rotary(q, k, cos, sin, inplace=True)
    assert [out.data_ptr() for out in outs] == [q.data_ptr(), k.data_ptr()]


def test_gradient_is_the_adjoint() -> None:
    rotary_cases.assert_adjoint(torch.float32)


@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens_first", "heads_first"])
def test_offsets_beyond_int32_are_right(heads_first: bool) -> None:
    # 4 GB of addresses, of which a few pages are touched. An odd stride, so that no unit makes it
    # small enough.
    step = 2**29 + 1
    memory = torch.empty(4 * step + 2, dtype=torch.bfloat16)
    shape, strides = ((1, 5, 2), (2, step, 1)) if heads_first else ((5, 1, 2), (step, 2, 1))
    q = memory.as_strided(shape, strides)
    k = draw(*shape, seed=1, dtype=torch.bfloat16)
    cos, sin = draw(2, shape[0], 2, seed=2, dtype=torch.float32)
    q.copy_(k)
    out_q, out_k = rotary.apply_rotary(q, k, cos, sin, inplace=True)
    assert out_q.data_ptr() == memory.data_ptr()
    assert torch.equal(out_q, out_k)
