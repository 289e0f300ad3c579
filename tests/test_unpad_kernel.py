"""The unpadding kernels without a GPU: in Triton's interpreter, and who serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from interpreted import passed_in_the_interpreter
from padless.kernels import trial, unpad
from unpad_cases import CASES


@pytest.mark.requires("triton")
def test_kernels_pass_their_tests_in_the_interpreter() -> None:
    assert passed_in_the_interpreter("unpad_interpreted.py") > len(CASES) + 20


MASK = torch.ones(2, 3, dtype=torch.bool)


def test_the_cpu_is_left_to_torch() -> None:
    assert unpad.unpad_rows(MASK, None, None, None) is None


class _Other(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "mask, ids",
    [
        (MASK.float(), None),
        (MASK.as_subclass(_Other), None),
        (MASK, torch.zeros(2, 4, dtype=torch.int64)),
        (MASK, torch.zeros(2, 3)),
        (MASK[:, :0], None),
        (MASK, torch.zeros(2, 3, dtype=torch.int64, device="meta")),
    ],
    ids=["float", "subclass", "shape", "float_ids", "empty", "device"],
)
def test_what_the_kernels_do_not_take_is_left_to_torch(
    mask: torch.Tensor, ids: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpad, "is_gpu", lambda x: True)
    monkeypatch.setattr(unpad, "_fault", lambda device: None)
    assert not unpad._serves([x for x in (mask, ids) if x is not None])
    assert unpad._serves([MASK, torch.zeros(2, 3, dtype=torch.int64)])


def test_a_broken_triton_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpad, "is_gpu", lambda x: True)
    monkeypatch.setattr(trial, "import_optional", lambda name: (None, "no triton"))
    monkeypatch.setattr(unpad, "_fault", unpad._fault.__wrapped__)
    assert unpad.unpad_rows(MASK, None, None, None) is None


@pytest.mark.requires("triton")
@pytest.mark.parametrize("name", ["_count_kernel", "_compact_kernel"])
def test_kernels_compile_for_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from padless.kernels import unpad_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(unpad_triton, name)
    constants = {"IGNORED": -100, "BLOCK": unpad_triton._BLOCK, "ROWS": unpad_triton._ROWS}
    constants |= dict.fromkeys(("HAS_IDS", "HAS_LABELS", "HAS_SHIFT"), True)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"mask_ptr": "*u8", "cu_seqlens_ptr": "*i32"}
    signature = {
        key: "constexpr" if key in constants else types.get(key, "*i64") for key in kernel.arg_names
    } | {key: "i32" for key in unpad_triton._SIZES if key in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert "st.global" in compiled.asm["ptx"]
