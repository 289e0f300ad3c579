"""`merge_rows` without a GPU: torch's twin, who serves, the kernel interpreted and compiled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_cases
from interpreted import passed_in_the_interpreter
from kernel_launches import ptx_for_hopper
from merge_cases import CASES, DTYPES, Case
from padless.kernels import merge as module
from padless.kernels.merge import merge_rows

DOUBLE = (torch.float64, torch.float64)


@pytest.mark.parametrize("dtypes", [*DTYPES, DOUBLE], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_twin_is_right(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    merge_cases.assert_right(case, dtypes)


def test_the_twin_keeps_float64() -> None:
    out, part = torch.ones(3, 1, 2, dtype=torch.float64), torch.full((3, 1, 2), 1 + 2.0**-40)
    lse = torch.zeros(1, 3, dtype=torch.float64)
    merge_rows(out, lse, part.double() + 2.0**-40, lse.clone(), slice(0, 3))
    assert (out == 1 + 2.0**-41).all()
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, 2.0), rtol=1e-15, atol=0)


@pytest.mark.requires("triton")
def test_kernel_passes_its_tests_in_the_interpreter() -> None:
    assert passed_in_the_interpreter("merge_interpreted.py") > len(CASES) * len(DTYPES)


class _Other(Tensor):
    pass


def _given(dtype: torch.dtype = torch.bfloat16, index: bool = False) -> list[Any]:
    case = Case(8, 4, "index" if index else 2, 2, 16)
    out, lse, part, part_lse, place = merge_cases.inputs(case, (dtype, dtype))
    return [out, lse, part, part_lse, place if isinstance(place, Tensor) else None]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the choice take the CPU for a GPU with a sound kernel."""
    monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(module, "_fault", lambda device: None)


@pytest.mark.usefixtures("on_gpu")
@torch.no_grad()
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._serves(*_given()) and module._serves(*_given(index=True))
    assert not module._serves(*_given(torch.float64))
    changes: list[tuple[int, Any]] = [
        (0, lambda x: x.as_subclass(_Other)),
        (0, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        (0, lambda x: x[:, :1].contiguous()),
        (1, lambda x: x.double()),
        (1, lambda x: x.T.contiguous().T),
        (2, lambda x: x[..., :8].contiguous()),
        (2, lambda x: x.double()),
        (2, lambda x: x[::2]),
        (3, lambda x: x.double()),
        (3, lambda x: x[:, 1:].contiguous()),
    ]
    for number, change in changes:
        given = _given()
        given[number] = change(given[number])
        assert not module._serves(*given), number
    with torch.enable_grad():
        assert not module._serves(*_given())
    for mode in ("is_tracing", "is_compiling"):
        with monkeypatch.context() as patch:
            patch.setattr(module, mode, lambda: True)
            assert not module._serves(*_given())
    monkeypatch.setattr(module, "_fault", lambda device: "no triton")
    assert not module._serves(*_given())


@torch.no_grad()
def test_the_cpu_is_left_to_torch() -> None:
    assert not module._serves(*_given())


# 4 words of 32 bits are 8 numbers of half precision.
@pytest.mark.requires("triton")
@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_kernel_is_compiled_to_vector_loads_and_stores(
    head_dim: int, has_index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = _ptx(head_dim, has_index)
    loads = re.findall(r"ld\.global\.(\S+)", ptx)
    stores = re.findall(r"st\.global\.(\S+)", ptx)
    # The others are logarithms and the index.
    assert set(loads) <= {"v4.b32", "b32", "b64"} and loads.count("v4.b32") >= 4
    assert set(stores) <= {"v4.b32", "b32"} and stores.count("v4.b32") >= 2


def _ptx(head_dim: int, has_index: bool) -> str:
    """Compiles the kernel for Hopper, which takes no GPU, as a launch in bfloat16 would."""
    import triton

    from padless.kernels import merge_triton

    kernel = merge_triton._merge_kernel
    block = triton.next_power_of_2(head_dim)
    constants: dict[str, Any] = {
        "HAS_INDEX": has_index,
        "NUM_HEADS": 32,
        "HEAD_DIM": head_dim,
        "ROWS": merge_triton._NUMBERS // block,
        "BLOCK": block,
    }
    types = {"out_ptr": "*bf16", "part_ptr": "*bf16", "lse_ptr": "*fp32", "part_lse_ptr": "*fp32"}
    types |= {"index_ptr": "*i64" if has_index else "*fp32"}
    types |= dict.fromkeys(("rows", "start", "stride_lse"), "i32")
    return ptx_for_hopper(kernel, constants, types, num_warps=4)
