"""What `varlen_attention` promises of how it runs on CUDA: no wait, nothing rebuilt, same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from varlen_gpu_cases import CUDA, SERVED, draw_lengths, need

from accuracy import draw
from attention_cases import Case
from padless import compiled
from padless.attention import varlen_attention
from padless.backends import fa4, torch_varlen
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout

pytestmark = pytest.mark.gpu


# More keys than queries is where sdpa builds a mask.
@pytest.mark.parametrize("keys", [(70, 3, 64), (90, 3, 200)], ids=["square", "more_keys"])
@pytest.mark.parametrize("backend, dtype", SERVED, ids=str)
def test_a_call_never_waits_for_the_gpu(
    backend: str, dtype: torch.dtype, keys: tuple[int, ...]
) -> None:
    case = Case("no_wait", (70, 3, 64), keys)
    need(backend, case, dtype)
    q, k, v = case.inputs(dtype, CUDA)
    layout = VarlenLayout.from_lengths(case.seqlens_q, device=CUDA)
    layout_k = VarlenLayout.from_lengths(case.keys, device=CUDA)
    dout = torch.ones_like(q)

    def step() -> None:
        out = varlen_attention(q, k, v, layout, layout_k=layout_k, backend=backend)
        torch.autograd.grad(out, (q, k, v), dout)

    step()  # what is loaded or planned on the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of_fa4() -> int:
    """Counts the kernels that FlashAttention-4 has compiled in this process."""
    module, _ = fa4._package()
    caches = [getattr(value, "compile_cache", None) for value in vars(module or object).values()]
    return sum(len(cache.cache) for cache in caches if cache is not None)


# No plan, no compilation and no autotuning for a length that was not met before.
@pytest.mark.parametrize("backend", ["auto", "fa4", "torch_varlen", "sdpa"])
def test_nothing_is_built_for_a_new_length(backend: str) -> None:
    case = Case("new_lengths", (5, 70))
    need(backend, case, torch.bfloat16)
    rng = random.Random(0)

    def step(lengths: list[int]) -> None:
        drawn = Case("drawn", tuple(lengths))
        inputs = drawn.inputs(torch.bfloat16, CUDA)
        out = drawn.attend(*inputs, backend=backend)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    step([5])
    before = kernels_of_fa4()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(40):
            step(draw_lengths(rng))
        torch.cuda.synchronize()
    assert kernels_of_fa4() == before
    names = {event.key for event in profiled.key_averages()}
    assert names
    assert not [name for name in names if "cudnn" in name.lower()]


@pytest.fixture
def _torch_told_to_repeat() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Keys of several tiles, where the order in which dq is summed shows.
REPEAT = Case("repeat", (700, 33, 1025), num_heads=8, num_kv_heads=2, head_dim=128)


@pytest.mark.usefixtures("_torch_told_to_repeat")
@pytest.mark.parametrize("backend", ["auto", "torch_varlen", "sdpa", "fa4", "fa2"])
def test_gradients_repeat_when_torch_is_told_to(backend: str) -> None:
    need(backend, REPEAT, torch.bfloat16)
    assert_gradients_repeat(backend)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "fa4", "fa2"])
def test_gradients_repeat_when_the_call_says_so(backend: str) -> None:
    need(backend, REPEAT, torch.bfloat16)
    assert_gradients_repeat(backend, deterministic=True)


def assert_gradients_repeat(backend: str, deterministic: bool | None = None) -> None:
    """Asserts that twenty backward passes give the same bits."""
    inputs = REPEAT.inputs(torch.bfloat16, CUDA)
    dout = draw(*inputs[0].shape, seed=4, dtype=torch.bfloat16, device=CUDA)

    def gradients() -> tuple[Tensor, ...]:
        out = REPEAT.attend(*inputs, backend=backend, deterministic=deterministic)
        return torch.autograd.grad(out, inputs, dout)

    first = gradients()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), first, strict=True))


def test_torch_says_no_to_gradients_that_it_would_not_repeat() -> None:
    with pytest.raises(BackendUnavailableError, match="repeats its gradients under"):
        REPEAT.attend(
            *REPEAT.inputs(torch.bfloat16, CUDA), backend="torch_varlen", deterministic=True
        )


@pytest.mark.skipif(not compiled.SUPPORTED, reason="needs torch.library.custom_op (torch 2.4)")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "fa4", "torch_varlen", "sdpa"])
def test_compiled_calls_take_new_lengths_without_waiting_or_compiling(
    backend: str, compiler: str
) -> None:
    case = Case("compiled", (5, 70))
    need(backend, case, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout) -> Tensor:
        return 2 * varlen_attention(2 * q, k, v, layout, backend=backend)

    traced = torch.compile(attend, backend=compiler, fullgraph=True)
    rng = random.Random(1)
    graphs = []
    for attempt in range(12):
        drawn = Case("drawn", tuple(draw_lengths(rng)))
        layout = VarlenLayout.from_lengths(drawn.seqlens_q, device=CUDA)
        inputs = drawn.inputs(torch.bfloat16, CUDA)
        dout = draw(*inputs[0].shape, seed=4, dtype=torch.bfloat16, device=CUDA)
        expected = attend(*inputs, layout)
        grads = torch.autograd.grad(expected, inputs, dout)
        if attempt >= 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            out = traced(*inputs, layout)
            found = torch.autograd.grad(out, inputs, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(out, expected)
        for one, other in zip(found, grads, strict=True):
            # dq is summed by atomics: the last bits may differ.
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()
    assert len(set(graphs[4:])) == 1


@pytest.mark.parametrize("kernel, module", [("fa4", fa4), ("torch_varlen", torch_varlen)])
def test_a_kernel_whose_backward_stands_alone_is_known_to(kernel: str, module: Any) -> None:
    case = Case("alone", (5, 70))
    need(kernel, case, torch.bfloat16)
    assert module.saves_lse()
    q, k, v = (x.detach() for x in case.inputs(torch.bfloat16, CUDA))
    layout = VarlenLayout.from_lengths(case.seqlens_q, device=CUDA)
    options = {"causal": True, "softmax_scale": case.scale}
    out, lse = module.varlen_with_lse(q, k, v, layout, layout, **options)
    assert (lse.shape, lse.dtype) == ((case.num_heads, len(q)), torch.float32)
    dout = draw(*q.shape, seed=4, dtype=torch.bfloat16, device=CUDA)
    found = module.gradients(dout, q, k, v, out, lse, layout, layout, **options)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(case.attend(*inputs, backend=kernel), inputs, dout)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
