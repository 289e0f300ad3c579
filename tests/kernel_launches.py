"""Launches of a Triton kernel, counted; and what one would be compiled to for a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def count_launches(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> list[tuple[int, ...]]:
    """Lists the grid of every launch of a module's kernel from now on."""
    kernel, grids = getattr(module, name), []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Recorded())
    return grids


def ptx_for_hopper(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], *, num_warps: int
) -> str:
    """Compiles a kernel for Hopper, which takes no GPU.

    Args:
        kernel: a function of `triton.jit`.
        constants: by name, what is compiled in.
        types: by name, of what is not `*bf16`.
        num_warps: of a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16")
        for name in kernel.arg_names
    }
    # Memory that torch allocates is aligned to 16 bytes and more.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps},
    )
    return str(compiled.asm["ptx"])
