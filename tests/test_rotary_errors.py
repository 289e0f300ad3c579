"""What `apply_rotary` refuses, and why Triton's kernel is passed over."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from padless.kernels import rotary, rotary_torch, trial
from padless.kernels.rotary import apply_rotary, rotary_backend
from rotary_cases import RotaryCase

SMALL = RotaryCase("small", 5, 3, 2, 8)


def test_backend_on_the_cpu_is_torch_and_says_why() -> None:
    assert rotary_backend(torch.zeros(1)) == ("torch", "needs CUDA, got cpu")


def test_backend_is_torch_for_dtypes_that_triton_would_cut() -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float64

    reason = rotary_backend(OnGpu()).reason  # type: ignore[arg-type]
    assert reason == "needs float16, bfloat16 or float32, got torch.float64"


@pytest.mark.parametrize(
    "module, reason",
    [
        (None, "import triton failed: ImportError: gone"),
        (object(), "Triton's kernel failed its trial: RuntimeError: no C compiler"),
    ],
    ids=["missing", "broken"],
)
def test_backend_is_torch_where_triton_cannot_run(
    module: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotate_of(backend: str) -> Any:
        raise RuntimeError("no C compiler\nand a long trace")

    answer = (module, "" if module else reason)
    monkeypatch.setattr(trial, "import_optional", lambda name: answer)
    monkeypatch.setattr(rotary, "_rotate_of", rotate_of)
    assert rotary._triton_fault.__wrapped__(torch.device("cpu")) == reason


def test_a_kernel_that_is_wrong_fails_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate_of(backend: str) -> Any:
        def rotate_back(*args: Any, transposed: bool) -> None:
            rotary_torch.rotate(*args, transposed=not transposed)

        return rotate_back if wrong else rotary_torch.rotate

    monkeypatch.setattr(trial, "import_optional", lambda name: (object(), ""))
    monkeypatch.setattr(rotary, "_rotate_of", rotate_of)
    for wrong in (False, True):
        fault = rotary._triton_fault.__wrapped__(torch.device("cpu"))
        assert (fault is not None) == wrong
    assert "Tensor-likes are not close" in fault


def _changed(**changes: Any) -> dict[str, Any]:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    return {"q": q, "k": k, "cos": cos, "sin": sin, **changes}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"q": torch.zeros(5, 24)},
            ValueError,
            "q must have shape (total, num_heads, head_dim), got (5, 24)",
        ),
        (
            {"k": torch.zeros(1, 5, 2, 8)},
            ValueError,
            "k must have shape (total, num_heads, head_dim), got (1, 5, 2, 8)",
        ),
        (
            {"q": torch.zeros(5, 3, 8, dtype=torch.int64)},
            TypeError,
            "q must be floating, got torch.int64",
        ),
        (
            {"cos": torch.zeros(5, 8, dtype=torch.int64)},
            TypeError,
            "cos must be floating, got torch.int64",
        ),
        (
            {"k": torch.zeros(5, 2, 8, dtype=torch.float16)},
            TypeError,
            "k must have q's dtype torch.float32, got torch.float16",
        ),
        (
            {"sin": torch.zeros(5, 8, device="meta")},
            ValueError,
            "sin must be on q's device cpu, got meta",
        ),
        (
            {"q": torch.zeros(5, 3, 7)},
            ValueError,
            "head_dim must be even, since halves are rotated, got 7",
        ),
        (
            {"k": torch.zeros(4, 2, 8)},
            ValueError,
            "k must have q's total 5 and head_dim 8, got (4, 2, 8)",
        ),
        (
            {"cos": torch.zeros(1, 5, 4)},
            ValueError,
            "cos must have shape (5, 8) or (1, 5, 8), one row a token of q, got (1, 5, 4)",
        ),
        (
            {"cos": torch.zeros(2, 5, 8)},
            ValueError,
            "cos must have shape (5, 8) or (1, 5, 8), one row a token of q, got (2, 5, 8)",
        ),
        (
            {"sin": torch.zeros(5, 8)},
            ValueError,
            "sin must have cos's shape (1, 5, 8), got (5, 8)",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        apply_rotary(**_changed(**changes), inplace=False)
