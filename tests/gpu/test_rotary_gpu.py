"""`apply_rotary` on CUDA: numbers, launches, compilations, and its speed beside a copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rotary_cases
from accuracy import draw
from padless.kernels import rotary_torch
from padless.kernels.rotary import apply_rotary, rotary_backend
from rotary_cases import CASES, RotaryCase, assert_rounded_once, rotation

pytestmark = [pytest.mark.gpu, pytest.mark.requires("triton")]

CUDA = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (num_heads, num_kv_heads, head_dim): LLaMA 3 8B, LLaMA 2 7B, SmolLM2 135M, and two sizes of head
# whose halves are no power of two, the second with vectors of 8 bytes.
SHAPES = [(32, 8, 128), (32, 32, 128), (9, 3, 64), (32, 32, 80), (32, 32, 72)]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Leaves NaN in the memory that torch hands out next: what is not written shows."""
    sizes = [2**power for power in range(8, 25) for _ in range(4)]
    blocks = [torch.full((n,), float("nan"), dtype=torch.bfloat16, device=CUDA) for n in sizes]
    del blocks


@pytest.fixture(autouse=True)
def _served_by_triton() -> None:
    assert rotary_backend(torch.zeros(1, device=CUDA)) == ("triton", None)


def kernels_compiled() -> int:
    """Counts the variants of the kernel that this process holds, on all devices."""
    from padless.kernels.rotary_triton import _rotary_kernel

    return sum(len(caches[0]) for caches in _rotary_kernel.device_caches.values())


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_right(
    case: RotaryCase, dtype: torch.dtype, inplace: bool
) -> None:
    rotary_cases.assert_case_right(case, dtype, CUDA, inplace=inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_rotated_and_nothing_beside_them(dtype: torch.dtype) -> None:
    rotary_cases.assert_strided_right(dtype, CUDA)


def test_inputs_strided_in_the_last_dimension_are_rotated_elsewhere() -> None:
    rotary_cases.assert_last_dimension_strided_right(CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_adjoint(dtype: torch.dtype) -> None:
    rotary_cases.assert_adjoint(dtype, CUDA)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("which", ["q", "k"])
def test_one_gradient_or_one_output_alone(which: str, inplace: bool) -> None:
    rotary_cases.assert_one_gradient_right(which, CUDA, inplace=inplace)
    rotary_cases.assert_one_output_used_right(which, CUDA, inplace=inplace)


def test_float64_is_rotated_by_torch() -> None:
    rotary_cases.assert_case_right(CASES[0], torch.float64, CUDA, inplace=True)
    assert rotary_backend(torch.zeros(1, device=CUDA, dtype=torch.float64)).name == "torch"


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens_first", "heads_first"])
def test_fifty_numbers_of_tokens_compile_nothing(heads_first: bool, head_dim: int) -> None:
    def step(total: int) -> None:
        case = RotaryCase("step", total, 6, 2, head_dim)
        q, k, cos, sin = case.inputs(torch.bfloat16, CUDA)
        if heads_first:
            q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
        q, k = q.requires_grad_(), k.requires_grad_()
        outs = apply_rotary(q * 1, k * 1, cos, sin, inplace=not heads_first)
        torch.autograd.grad(outs, (q, k), [torch.ones_like(out) for out in outs])

    step(48)
    before = kernels_compiled()
    # One token, odd numbers, multiples of 16, and each number once.
    for total in (1, *range(2, 42), 64, 127, 128, 129, 255, 1024, 4095, 4096, 4097):
        step(total)
    assert before >= 2
    assert kernels_compiled() == before


def test_a_call_never_waits_for_the_gpu() -> None:
    q, k, cos, sin = CASES[3].inputs(torch.bfloat16, CUDA)
    leaves = q.requires_grad_(), k.requires_grad_()
    douts = torch.ones_like(q), torch.ones_like(k)

    def step() -> None:
        outs = apply_rotary(q * 1, k * 1, cos, sin, inplace=True)
        torch.autograd.grad(outs, leaves, douts)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_numbers_are_rotated() -> None:
    num_heads, head_dim = 32, 128
    total = 2**31 // (num_heads * head_dim) + 3
    q = torch.ones(total, num_heads, head_dim, dtype=torch.bfloat16, device=CUDA)
    # The last tokens lie beyond int32, and are to be no copy of the first.
    q[-5:] = draw(5, num_heads, head_dim, seed=1, dtype=torch.bfloat16, device=CUDA)
    k = q[:, :1].clone()
    cos, sin = torch.rand(2, total, head_dim, device=CUDA)
    ends = [slice(0, 5), slice(total - 5, total)]
    before = [q[end].clone() for end in ends]
    apply_rotary(q, k, cos, sin, inplace=True)
    for end, x in zip(ends, before, strict=True):
        assert_rounded_once("q", q[end], x, rotation(cos[end], sin[end]))
        assert torch.equal(k[end], q[end][:, :1])


def test_every_gpu_rotates_on_itself_whatever_the_current_one() -> None:
    last = f"cuda:{torch.cuda.device_count() - 1}"
    with torch.cuda.device(0):
        rotary_cases.assert_case_right(CASES[3], torch.bfloat16, last, inplace=True)
        assert torch.cuda.current_device() == 0


def test_a_captured_call_replays() -> None:
    q0, k0, cos, sin = CASES[3].inputs(torch.bfloat16, CUDA)
    q, k = q0.clone(), k0.clone()
    apply_rotary(q, k, cos, sin, inplace=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_rotary(q, k, cos, sin, inplace=True)
    q.copy_(q0)
    k.copy_(k0)
    graph.replay()
    assert_rounded_once("q", q, q0, rotation(cos, sin))
    assert_rounded_once("k", k, k0, rotation(cos, sin))


def test_compiled_code_is_one_graph_and_right() -> None:
    q, k, cos, sin = CASES[3].inputs(torch.bfloat16, CUDA)
    compiled = torch.compile(apply_rotary, fullgraph=True)
    for out, x in zip(compiled(q, k, cos, sin, inplace=True), (q, k), strict=True):
        assert_rounded_once("out", out, x, rotation(cos, sin))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], None]]:
    """Prints past pytest's capture."""

    def printed(line: str) -> None:
        with capsys.disabled():
            print(line)

    yield printed


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_speed_beside_a_copy_and_transformers(
    shape: tuple[int, int, int], say: Callable[[str], None]
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    # As many numbers as 32768 tokens of LLaMA 3 8B: a call outlasts what Python takes to launch it,
    # and nothing stays in the L2 cache.
    total = 32768 * 40 * 128 // ((num_heads + num_kv_heads) * head_dim)
    drawn = torch.Generator(CUDA).manual_seed(0)
    leaves = [
        torch.randn(1, total, heads * head_dim, generator=drawn, dtype=torch.bfloat16, device=CUDA)
        for heads in (num_heads, num_kv_heads)
    ]
    angles = torch.arange(total, device=CUDA)[:, None] * 0.01 ** torch.arange(
        0, 1, 2 / head_dim, device=CUDA
    )
    cos, sin = (f(angles).repeat(1, 2)[None].bfloat16() for f in (torch.cos, torch.sin))
    packed = [x.view(total, -1, head_dim) for x in leaves]
    tables = cos.nbytes + sin.nbytes
    moved_bytes = 2 * sum(x.nbytes for x in leaves) + tables
    source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.view(1, total, -1, head_dim).transpose(1, 2) for x in (q, k))
        return apply_rotary_pos_emb(q, k, cos, sin)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.view(total, -1, head_dim) for x in (q, k))
        return apply_rotary(q, k, cos, sin, inplace=False)

    expected = [rotary_torch.rotated(x, cos[0], sin[0]) for x in packed]
    for out, right in zip(ours(*leaves), expected, strict=True):
        torch.testing.assert_close(out, right, rtol=2**-7, atol=1e-6)
    del expected, out, right
    timed: dict[str, Callable[[], object]] = {
        "copy of the same bytes": lambda: target.copy_(source),
        "forward in place": lambda: apply_rotary(*packed, cos, sin, inplace=True),
        "forward": lambda: ours(*leaves),
        "forward of transformers": lambda: theirs(*leaves),
    }
    for name, function in (("backward", ours), ("backward of transformers", theirs)):
        inputs = [x.clone().requires_grad_() for x in leaves]
        outs = function(*inputs)
        douts = [torch.randn_like(out) for out in outs]
        timed[name] = _backward(outs, inputs, douts)
    ms = _interleaved_ms(timed)
    copy_ms = ms["copy of the same bytes"]
    say(f"\n{shape} x {total} tokens, bfloat16, {torch.cuda.get_device_name()}")
    for name, took in ms.items():
        gb_s = moved_bytes / took / 1e6
        say(f"  {name:26} {took:7.3f} ms  {gb_s:6.0f} GB/s  {copy_ms / took:5.2f} of a copy")
    assert ms["forward in place"] < ms["forward of transformers"]
    assert ms["forward"] < ms["forward of transformers"]
    assert ms["backward"] < ms["backward of transformers"]


def _backward(outs: tuple[Tensor, ...], inputs: list[Tensor], douts: list[Tensor]) -> Callable:
    return lambda: torch.autograd.grad(outs, inputs, douts, retain_graph=True)


def _interleaved_ms(
    timed: dict[str, Callable[[], object]], *, rounds: int = 15
) -> dict[str, float]:
    """Times each function on the GPU: medians of rounds in which all take turns."""
    for function in timed.values():
        for _ in range(3):
            function()
    took: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(15):
        for name, function in timed.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # Keeps the GPU busy while Python launches, so that no gap between kernels is timed.
            torch.cuda._sleep(1_000_000)
            start.record()
            for _ in range(5):
                function()
            end.record()
            torch.cuda.synchronize()
            took[name].append(start.elapsed_time(end) / 5)
    return {name: statistics.median(times) for name, times in took.items()}
