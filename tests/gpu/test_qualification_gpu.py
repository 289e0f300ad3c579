"""Qualification on real kernels: right ones pass with room to spare, wrong ones are passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_cases import Case, assert_numbers_right
from padless import selection
from padless.backends import sdpa, torch_varlen
from padless.backends.request import AttentionRequest
from padless.qualification import Verdict, forget_verdicts, known_verdict, qualify
from padless.selection import adapter, forget_selections, select_backend
from padless.workload import as_if_much_work
from planted_backends import gradient_with, planted

pytestmark = pytest.mark.gpu

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Grouped as in LLaMA-3, every head its own, and one for all.
HEADS = pytest.mark.parametrize("heads", [(32, 8), (32, 32), (32, 1), (9, 3)], ids=str)
NEEDS_FA4 = pytest.mark.requires("flash_attn.cute.interface")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and nothing remembered before and after it."""
    monkeypatch.setenv("PADLESS_CACHE", str(tmp_path))
    monkeypatch.delenv("PADLESS_REQUALIFY", raising=False)
    forget_selections()
    yield tmp_path
    forget_selections()


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Leaves NaN in the memory that torch hands out next: what is read before written shows."""
    sizes = [2**power for power in range(8, 25) for _ in range(4)]
    blocks = [
        torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda") for size in sizes
    ]
    del blocks


def family(
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    **options: Any,
) -> AttentionRequest:
    """A family on the current GPU, causal and with gradients unless an option says otherwise."""
    device = torch.device("cuda", torch.cuda.current_device())
    asked = {"causal": True, "needs_grad": True, **options}
    return AttentionRequest(device, dtype, head_dim, *heads, **asked)


def measure(backend: Any, request: AttentionRequest) -> Verdict:
    """Measures twice, since the first time loads kernels, and prints what came."""
    verdict = qualify(backend, request)
    first_ms = verdict.elapsed_ms
    path = Path(os.environ["PADLESS_CACHE"])
    for file in path.iterdir():
        file.unlink()
    forget_verdicts()
    verdict = qualify(backend, request)
    print(
        f"\n{backend.NAME} {backend.version()} {str(request.dtype)[6:]} head_dim "
        f"{request.head_dim} heads {request.num_heads}/{request.num_kv_heads} "
        f"{'causal' if request.causal else 'full'} {'grad' if request.needs_grad else 'forward'}: "
        f"{verdict.reason or 'right'}, ratio {verdict.ratio:.2f}, "
        f"{first_ms:.0f} ms, then {verdict.elapsed_ms:.0f} ms"
    )
    return verdict


@HALF
@HEADS
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_torch_varlen_qualifies(head_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    verdict = measure(torch_varlen, family(dtype, head_dim, heads))
    assert verdict.passed, verdict.reason
    assert verdict.elapsed_ms < 500


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"needs_grad": False},
        {"window_size": (100, 0)},
        {"causal": False, "window_size": (40, 9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["torch_varlen", "sdpa"])
def test_options_qualify(name: str, options: dict[str, Any]) -> None:
    request = family(**options)
    if reason := adapter(name).reject(request):
        pytest.skip(reason)
    verdict = measure(adapter(name), request)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("allow_tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sdpa_in_float32_qualifies_with_and_without_tf32(head_dim: int, allow_tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32  # put back by a fixture of all tests
    verdict = measure(sdpa, family(torch.float32, head_dim))
    assert verdict.passed, verdict.reason


@HALF
@HEADS
@pytest.mark.parametrize("head_dim", [33, 64, 128])
def test_sdpa_in_half_types_qualifies(
    head_dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    verdict = measure(sdpa, family(dtype, head_dim, heads))
    assert verdict.passed, verdict.reason


@NEEDS_FA4
@HALF
@HEADS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fa4_qualifies(head_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    request = family(dtype, head_dim, heads)
    if reason := adapter("fa4").reject(request):
        pytest.skip(reason)
    verdict = measure(adapter("fa4"), request)
    assert verdict.passed, verdict.reason
    assert select_backend(request).name == "fa4"


# Where FlashAttention-4 4.0.0b36 has gradients off by 130 % on Hopper.
@NEEDS_FA4
@pytest.mark.parametrize("head_dim", [72, 80, 104, 112])
def test_fa4_is_right_or_served_with_padded_heads(head_dim: int) -> None:
    request = family(head_dim=head_dim)
    if reason := adapter("fa4").reject(request):
        pytest.skip(reason)
    verdict = measure(adapter("fa4"), request)
    chosen = select_backend(request)
    assert chosen.name == "fa4"
    assert (chosen.head_dim == head_dim) == verdict.passed
    if not verdict.passed:
        assert chosen.trace[0].rejected == f"computes wrong here: {verdict.reason}"
    # The checks of the tests, which share nothing with those of the library.
    for seqlens in ((63, 64, 65, 129), (300, 1, 0, 511)):
        case = Case("served", seqlens, num_heads=32, num_kv_heads=8, head_dim=head_dim)
        with as_if_much_work():
            assert_numbers_right(case, "auto", torch.bfloat16, "cuda")


def _dq_off_by_2_percent(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return gradient_with(q, lambda dq: 1.02 * dq), k, v


def _outliers_only(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    spread = bool(v.abs().amax() > 15 * v.float().square().mean().sqrt())
    return q, gradient_with(k, lambda dk: 1.2 * dk if spread else dk), v


@HALF
@pytest.mark.parametrize(
    "change",
    [
        _dq_off_by_2_percent,
        _outliers_only,
        lambda q, k, v: (q, k.roll(1, 1), v.roll(1, 1)),
        lambda q, k, v: (q * 1.02, k, v),
        lambda q, k, v: (torch.as_strided(q, q.shape, q.contiguous().stride()), k, v),
    ],
    ids=["dq 2 percent", "outliers", "wrong group", "scale", "strides"],
)
def test_a_fault_around_a_real_kernel_is_caught(
    change: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *layouts: Any, **options: Any) -> Tensor:
        return torch_varlen.varlen(*change(q, k, v), *layouts, **options)

    verdict = qualify(planted(attend), family(dtype))
    print(f"\n{verdict.reason}")
    assert not verdict.passed
    assert not verdict.reason.startswith("raised")


def test_a_remembered_answer_never_waits_for_the_gpu() -> None:
    request = family()
    select_backend(request)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_backend(request)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_measured_while_a_cuda_graph_is_captured() -> None:
    request = family()
    x = torch.zeros(8, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        chosen = select_backend(request)
    assert chosen.name == "reference"
    rejected = {candidate.name: str(candidate.rejected) for candidate in chosen.trace}
    assert "not measured yet" in rejected["torch_varlen"]
    assert "not measured yet" in rejected["sdpa"]
    measured = select_backend(request)
    assert measured.name != "reference"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        assert select_backend(request) is measured
        # Another kind of request, which was measured too.
        assert select_backend(replace(request, num_heads=64, num_kv_heads=16)).name == measured.name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_first_question_may_come_inside_a_backward_pass(use_reentrant: bool) -> None:
    # The thread that computes gradients for the GPU is then the one that asks.
    asked = []

    def region(x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            asked.append(select_backend(family()))
        return (x @ x).exp()

    x = torch.randn(3, 3, device="cuda", requires_grad=True)
    checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
    assert len(asked) == 1
    assert asked[0].name != "reference"


def test_random_numbers_and_modes_are_left_alone() -> None:
    before = torch.cuda.get_rng_state().tolist()
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        assert qualify(torch_varlen, family()).passed
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled()
    assert torch.cuda.get_rng_state().tolist() == before


# Indexing out of bounds ends CUDA for the process.
KILLER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from planted_backends import flash_like, planted
from padless.backends.request import AttentionRequest
from padless.qualification import known_verdict, qualify

def kill(q, k, v, *layouts, **options):
    return q[torch.full((q.shape[0],), 10**6, device=q.device)]

request = AttentionRequest(torch.device("cuda", 0), torch.bfloat16, 64, 4, 2, True)
if sys.argv[2] == "recall":
    print(known_verdict(planted(), request))
else:
    try:
        qualify(planted(kill), request)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_backend_that_ends_cuda_is_passed_over_by_the_next_process() -> None:
    def run(what: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", KILLER, str(Path(__file__).parents[1]), what],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout + done.stderr[-2000:]

    said = run("kill")
    assert "BackendUnavailableError planted raised" in said, said
    assert "CUDA cannot go on in this process" in said, said
    recalled = run("recall")
    assert "Verdict(passed=False, reason='raised" in recalled, recalled


def test_the_current_device_and_the_order_of_backends_are_as_they_were() -> None:
    device = torch.cuda.current_device()
    request = family()
    assert select_backend(request).trace[-1].rejected is None
    assert torch.cuda.current_device() == device
    assert known_verdict(selection.adapter(select_backend(request).name), request) is not None
