"""The unpadding kernels on the CPU, in Triton's interpreter, against torch's operations.

Triton decides at import whether it interprets, so `test_unpad_kernel.py` runs this file in a
process of its own; pytest does not collect it by name.
"""

from __future__ import annotations

import os

import pytest
import torch

import unpad_cases
from padless.kernels import unpad, unpad_triton
from unpad_cases import CASES, UnpadCase

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_unpad_kernel.py"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpad, "is_gpu", lambda x: True)
    # Several blocks of slots, and of rows, also in small cases.
    monkeypatch.setattr(unpad_triton, "_BLOCK", 4)
    monkeypatch.setattr(unpad_triton, "_ROWS", 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_make_what_torch_makes(case: UnpadCase) -> None:
    unpad_cases.assert_same(case, "cpu")


@pytest.mark.parametrize("seed", range(20))
def test_random_masks(seed: int) -> None:
    unpad_cases.assert_same(unpad_cases.random_case(seed), "cpu")


def test_trial_passes() -> None:
    assert unpad._fault.__wrapped__(torch.device("cpu")) is None
