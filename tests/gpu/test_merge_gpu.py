"""The kernel that merges attention over keys in parts, on a GPU."""

from __future__ import annotations

import pytest
import torch

import merge_cases
from merge_cases import CASES, DTYPES, Case
from padless.kernels import merge as module
from padless.kernels.merge import merge_rows

pytestmark = [pytest.mark.gpu, pytest.mark.requires("triton")]

# A rank's share of 32k tokens on two GPUs, and rows of it that are not neighbours.
LARGE = [Case(16384, 8192, 8192, 32, 128), Case(16384, 5000, "index", 32, 128)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_numbers_are_right_by_one_launch(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first call of a process tries the kernel.
    module._fault(torch.device("cuda", 0))
    launches = merge_cases.count_launches(monkeypatch)
    merge_cases.assert_right(case, dtypes, "cuda")
    assert len(launches) == (1 if case.rows else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_without_further_keys_stay(dtype: torch.dtype) -> None:
    merge_cases.assert_rows_without_further_keys_are_bit_equal(dtype, "cuda")


def test_float64_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = merge_cases.count_launches(monkeypatch)
    merge_cases.assert_right(CASES[1], (torch.float64, torch.float64), "cuda")
    assert launches == []


def test_trial_passes() -> None:
    assert module._fault.__wrapped__(torch.device("cuda", 0)) is None


@torch.no_grad()
def test_offsets_beyond_int32_are_right() -> None:
    rows, heads, head_dim = 2**17 + 1, 128, 128
    out = torch.zeros(rows, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    lse, part = torch.zeros(heads, rows, device="cuda"), torch.zeros_like(out)
    part[-1] = 3.0
    merge_rows(out, lse, part, torch.zeros_like(lse), slice(0, rows))
    assert (out[-1] == 1.5).all() and not out[:-1].any()


@torch.no_grad()
def test_no_number_of_rows_compiles_anything() -> None:
    from padless.kernels import merge_triton

    def compiled() -> int:
        caches = merge_triton._merge_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    def run(total: int, start: int) -> None:
        out = torch.ones(total, 4, 64, dtype=torch.bfloat16, device="cuda")
        lse, n = torch.zeros(4, total, device="cuda"), total - start
        merge_rows(out, lse, out[:n].clone(), lse[:, :n].clone(), slice(start, total))
        assert (out == 1).all()

    run(1, 0)
    before = compiled()
    for total in range(1, 40):
        run(total, total // 3)
    assert compiled() == before
