"""The rotary kernel without a GPU: its numbers in Triton's interpreter, and what it compiles to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from interpreted import passed_in_the_interpreter
from kernel_launches import ptx_for_hopper
from rotary_cases import INTERPRETED


@pytest.mark.requires("triton")
def test_kernel_passes_its_tests_in_the_interpreter() -> None:
    assert passed_in_the_interpreter("rotary_interpreted.py") > 4 * len(INTERPRETED)


# 72 is a multiple of 8 alone, and its half of 4: vectors of 8 bytes, where the others get 16.
@pytest.mark.requires("triton")
@pytest.mark.parametrize("head_dim, width", [(64, 4), (128, 4), (80, 4), (72, 2)])
def test_kernel_is_compiled_to_vector_loads_and_stores(
    head_dim: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = _ptx(num_heads=32, num_kv_heads=32, head_dim=head_dim)
    stores = re.findall(r"st\.global\.(\S+)", ptx)
    assert set(stores) == {f"v{width}.b32"}
    assert not re.search(r"ld\.global\.\S*b16", ptx)


def _ptx(*, num_heads: int, num_kv_heads: int, head_dim: int) -> str:
    """Compiles the kernel for Hopper, which takes no GPU, as a launch in bfloat16 would."""
    from padless.kernels import rotary_triton

    kernel = rotary_triton._rotary_kernel
    tiles = rotary_triton._tiles(num_heads, num_kv_heads, head_dim // 2)
    q, k = (torch.empty(2, heads, head_dim) for heads in (num_heads, num_kv_heads))
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HALF": head_dim // 2,
        "BLOCK_HEADS": tiles.block_heads,
        "BLOCK_KV_HEADS": tiles.block_kv_heads,
        "BLOCK_HALF": tiles.block_half,
        "ALIGN": rotary_triton._strides(q, k, q, k, q[:, 0], q[:, 0])[0],
        "TRANSPOSED": False,
    }
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"} | dict.fromkeys(rotary_triton._STRIDES, "i32")
    return ptx_for_hopper(kernel, constants, types, num_warps=tiles.num_warps)
