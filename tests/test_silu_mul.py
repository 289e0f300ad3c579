"""silu(gate) * up without a GPU: torch's twin, who serves, the kernel interpreted and compiled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import silu_mul_cases
from interpreted import passed_in_the_interpreter
from kernel_launches import ptx_for_hopper
from padless.kernels import silu_mul as module
from padless.kernels import trial
from padless.kernels.silu_mul import reject_silu_mul, silu_mul
from silu_mul_cases import HALF_TYPES, SHAPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_is_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    silu_mul_cases.assert_right(shape, dtype)


@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32, torch.float64], ids=str)
def test_the_twin_is_transformers_own_expression(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(3, 40, dtype=dtype, requires_grad=True) for _ in range(2))
    out, want = silu_mul(gate, up), F.silu(gate) * up
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.sum(), (gate, up))
    for grad, other in zip(grads, torch.autograd.grad(want.sum(), (gate, up)), strict=True):
        assert torch.equal(grad, other)


@pytest.mark.requires("triton")
def test_kernel_passes_its_tests_in_the_interpreter() -> None:
    assert passed_in_the_interpreter("silu_mul_interpreted.py") > 2 * len(SHAPES)


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = module._fault
    assert reject_silu_mul(CPU, torch.bfloat16) == "needs CUDA, got cpu"
    monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(module, "_fault", lambda device: None)
    assert reject_silu_mul(CPU, torch.bfloat16) is None
    assert "float16 or bfloat16" in str(reject_silu_mul(CPU, torch.float32))
    monkeypatch.setattr(module, "_fault", fault.__wrapped__)
    monkeypatch.setattr(trial, "import_optional", lambda name: (None, "no triton"))
    assert reject_silu_mul(CPU, torch.bfloat16) == "no triton"


class _Other(Tensor):
    pass


X = torch.ones(2, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "gate, up",
    [
        (X.float(), X.float()),
        (X, X.half()),
        (X, X[:1]),
        (X.t(), X.t()),
        (X.as_subclass(_Other), X),
        (X, X.as_subclass(_Other)),
        (X.clone().requires_grad_(), X),
        (X[0, 0], X[0, 0]),
    ],
    ids=["float32", "dtypes", "shapes", "strided", "gate", "up", "gradient", "number"],
)
def test_what_is_left_to_torch(gate: Tensor, up: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(module, "_fault", lambda device: None)
    assert module._serves(X, X)
    assert not module._serves(gate, up)
    torch.testing.assert_close(silu_mul(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("mode", ["is_tracing", "is_compiling"])
def test_tracers_see_torch_s_operations(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(module, "_fault", lambda device: None)
    monkeypatch.setattr(module, mode, lambda: True)
    assert not module._serves(X, X)


# 4 words of 32 bits are 8 numbers: a thread's.
@pytest.mark.requires("triton")
@pytest.mark.parametrize("width", [14336, 11008, 1536, 5632])
def test_kernel_is_compiled_to_vector_loads_and_stores(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = _ptx(width)
    assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {"v4.b32"}
    assert set(re.findall(r"ld\.global\.(\S+)", ptx)) == {"v4.b32"}


def _ptx(width: int) -> str:
    """Compiles the kernel for Hopper, which takes no GPU, as a launch in bfloat16 would."""
    from padless.kernels import silu_mul_triton

    kernel = silu_mul_triton._silu_mul_kernel
    constants: dict[str, Any] = {"WIDTH": width, "BLOCK": silu_mul_triton._BLOCK}
    return ptx_for_hopper(kernel, constants, {}, num_warps=4)
