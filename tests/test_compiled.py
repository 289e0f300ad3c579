"""`varlen_attention` inside torch.compile: no graph break, no compilation for new lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import padless.dispatch
from accuracy import draw
from attention_cases import CASES, Case
from compiled_cases import assert_compiled_is_eager, compile_attention, compile_whole
from padless import compiled
from padless.attention import varlen_attention
from padless.backends import sdpa
from padless.layout import VarlenLayout

pytestmark = pytest.mark.skipif(
    not compiled.SUPPORTED, reason="needs torch.library.custom_op (torch 2.4)"
)

BACKENDS = ("sdpa", "reference")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def layer(x: Tensor, weight: Tensor, layout: VarlenLayout, **options: Any) -> Tensor:
    """A layer around attention, as a model has it: one product, heads as views of it."""
    sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
    q, k, v = (
        part.view(-1, part.shape[-1] // HEAD_DIM, HEAD_DIM)
        for part in (x @ weight).split(sizes, dim=-1)
    )
    return varlen_attention(q, k, v, layout, **options).flatten(1) * 2


def draw_lengths(seed: int) -> list[int]:
    """Draws a batch as training data has it: any number of documents of any length, some empty."""
    rng = random.Random(seed)
    return [rng.randint(0, 30) for _ in range(rng.randint(2, 7))]


def step(function: Callable[..., Tensor], lengths: list[int], **options: Any) -> list[Tensor]:
    """Runs forward and backward of a batch; gives out and the gradients."""
    layout = VarlenLayout.from_lengths(lengths)
    x = draw(layout.total, 32, seed=1, dtype=torch.float32).requires_grad_()
    weight = (draw(32, WIDTH, seed=2, dtype=torch.float32) / 4).requires_grad_()
    out = function(x, weight, layout, **options)
    dout = draw(*out.shape, seed=3, dtype=torch.float32)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), dout)]


# "eager" runs what was traced, "aot_eager" traces the backward too.
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False, "window_size": (5, 3)}, {"deterministic": True, "softmax_scale": 0.3}],
    ids=["default", "window", "deterministic"],
)
def test_fifty_batches_of_new_lengths_are_compiled_for_twice(
    options: dict[str, Any], compiler: str
) -> None:
    compiled_layer = compile_whole(layer, compiler)
    graphs = []
    for seed in range(50):
        lengths = draw_lengths(seed)
        expected = step(layer, lengths, **options)
        for one, other in zip(step(compiled_layer, lengths, **options), expected, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counters["stats"]["unique_graphs"])
    # One for the first lengths, one for any.
    assert graphs == [1] + [2] * 49
    assert not counters["graph_break"]


@pytest.mark.slow
def test_inductor_is_right_too() -> None:
    compiled_layer = compile_whole(layer, "inductor")
    for seed in range(6):
        expected = step(layer, draw_lengths(seed))
        for one, other in zip(step(compiled_layer, draw_lengths(seed)), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_decoding_is_not_compiled_for_each_token() -> None:
    def decode(q: Tensor, k: Tensor, layout: VarlenLayout, layout_k: VarlenLayout) -> Tensor:
        return varlen_attention(q, k, k, layout, layout_k=layout_k)

    compiled_decode = compile_whole(decode)
    layout = VarlenLayout.from_lengths([1] * 3)
    q = draw(3, 4, 16, seed=1, dtype=torch.float32)
    for token in range(20):
        layout_k = VarlenLayout.from_lengths([5 + token, 9 + token, 2 + token])
        k = draw(layout_k.total, 2, 16, seed=token, dtype=torch.float32)
        torch.testing.assert_close(
            compiled_decode(q, k, layout, layout_k), decode(q, k, layout, layout_k)
        )
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_gives_the_same_numbers_compiled(case: Case, backend: str) -> None:
    assert_compiled_is_eager(case, backend, torch.float32)


# In the graph no tensor asks for gradients: what the call needs is said at tracing.
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_backend_is_asked_whether_gradients_follow(
    needs_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plan = padless.dispatch.plan_call

    def recorded(request: Any, *arguments: Any) -> padless.dispatch.Plan:
        seen.append(request.needs_grad)
        return plan(request, *arguments)

    monkeypatch.setattr(padless.dispatch, "plan_call", recorded)
    case = Case("asked", (3, 2), head_dim=16)
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    inputs[1].requires_grad_(needs_grad)
    layout = VarlenLayout.from_lengths(case.seqlens_q)
    out = compile_whole(lambda q, k, v, layout: varlen_attention(q, k, v, layout))(*inputs, layout)
    if needs_grad:
        out.sum().backward()
    assert set(seen) == {needs_grad}


@pytest.mark.parametrize("lengths", [(0,), (0, 0)], ids=str)
def test_no_token_at_all_gives_an_empty_output(lengths: tuple[int, ...]) -> None:
    assert_compiled_is_eager(Case("empty", lengths, head_dim=16), "auto", torch.float32)


def test_keys_that_no_query_sees_have_zero_gradients() -> None:
    case = Case("no_key", (2, 0), (0, 3), head_dim=16)
    q, k, v = case.inputs(torch.float32)
    layouts = [VarlenLayout.from_lengths(lengths) for lengths in (case.seqlens_q, case.keys)]
    compile_attention("auto")(q, k, v, *layouts).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_lengths_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    pairwise = compiled.pairwise
    monkeypatch.setattr(
        compiled, "pairwise", lambda bounds: reads.append(bounds) or pairwise(bounds)
    )

    def layers(x: Tensor, weight: Tensor, layout: VarlenLayout) -> Tensor:
        return sum(layer(x * n, weight, layout) for n in range(1, 5))

    step(compile_whole(layers), [5, 3, 9])
    assert len(reads) == 1


def test_tensors_that_do_not_fit_are_refused_when_the_graph_runs() -> None:
    traced = compile_whole(lambda q, layout: varlen_attention(q, q, q, layout))
    q = draw(5, 2, 16, seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="q must hold the 4 tokens of its layout, got 5"):
        traced(q, VarlenLayout.from_lengths([2, 2]))


def test_what_is_wrong_at_tracing_is_refused_then() -> None:
    traced = torch.compile(
        lambda q, layout: varlen_attention(q, q, q, layout, window_size=(-1, 0)), backend="eager"
    )
    with pytest.raises(ValueError, match="window_size must be"):
        traced(draw(4, 2, 16, seed=1, dtype=torch.float32), VarlenLayout.from_lengths([2, 2]))


def test_checkpointing_in_a_graph_gives_the_same_gradients() -> None:
    def checkpointed(x: Tensor, weight: Tensor, layout: VarlenLayout) -> Tensor:
        return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
            layer, x, weight, layout, use_reentrant=False
        )

    lengths = [5, 0, 9]
    expected = step(layer, lengths)
    for one, other in zip(step(compile_whole(checkpointed), lengths), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_in_a_graph_does_not_change_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = sdpa.F.scaled_dot_product_attention

    def recorded(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = real(q, *rest, **options)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", recorded)
    traced = compile_whole(lambda q, layout: varlen_attention(q, q, q, layout))
    q = draw(5, 2, 16, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traced(q, VarlenLayout.from_lengths([2, 3])).sum().backward()
    assert set(seen) == {torch.float32}


# What torch itself asks of an operator: schema, fake shapes and strides, autograd, tracing.
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_operator_keeps_torchs_rules(needs_grad: bool) -> None:
    layout = VarlenLayout.from_lengths([5, 0, 3])
    layout_k = VarlenLayout.from_lengths([4, 2, 9])
    # Strides that the operator must not hand on.
    q = draw(8, 16, 4, seed=1, dtype=torch.float32).transpose(1, 2)
    k, v = draw(15, 2, 2, 16, seed=2, dtype=torch.float32).unbind(1)
    inputs = [x.detach().requires_grad_(needs_grad) for x in (q, k, v)]
    boundaries = [one.cu_seqlens for one in (layout, layout_k)] * 2
    options = (True, 0.25, 3, -1, False, needs_grad, "sdpa")
    operator = torch.ops.padless.varlen_attention.default
    torch.library.opcheck(operator, (*inputs, *boundaries, *options))


def test_a_torch_without_custom_operators_breaks_the_graph_and_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = torch._dynamo.disable(padless.dispatch.attend)
    monkeypatch.setattr(compiled, "SUPPORTED", False)
    monkeypatch.setattr(compiled, "_attend_eagerly", eager, raising=False)
    traced = torch.compile(layer, backend="aot_eager")
    for seed in range(6):
        expected = step(layer, draw_lengths(seed))
        for one, other in zip(step(traced, draw_lengths(seed)), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert counters["graph_break"]
