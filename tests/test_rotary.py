"""`apply_rotary` on the CPU: its numbers, what autograd sees of it, and what it writes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import rotary_cases
from accuracy import draw
from padless.kernels import rotary_torch
from padless.kernels.rotary import apply_rotary
from rotary_cases import (
    CASES,
    RotaryCase,
    assert_rounded_once,
    rotation,
    version_bumped,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = RotaryCase("small", 5, 3, 2, 8)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_right(
    case: RotaryCase, dtype: torch.dtype, inplace: bool
) -> None:
    rotary_cases.assert_case_right(case, dtype, inplace=inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expression_for_compilers_is_right(case: RotaryCase, dtype: torch.dtype) -> None:
    q, k, cos, sin = case.inputs(dtype)
    for x in (q, k):
        out = rotary_torch.rotated(x, cos[0], sin[0])
        assert_rounded_once("out", out, x, rotation(cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_rotated_and_nothing_beside_them(dtype: torch.dtype) -> None:
    rotary_cases.assert_strided_right(dtype)


def test_inputs_strided_in_the_last_dimension_are_rotated_elsewhere() -> None:
    rotary_cases.assert_last_dimension_strided_right()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_adjoint(dtype: torch.dtype) -> None:
    rotary_cases.assert_adjoint(dtype)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("which", ["q", "k"])
def test_one_gradient_or_one_output_alone(which: str, inplace: bool) -> None:
    rotary_cases.assert_one_gradient_right(which, inplace=inplace)
    rotary_cases.assert_one_output_used_right(which, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_first_and_second_derivatives_pass_gradcheck(inplace: bool) -> None:
    q, k, cos, sin = SMALL.inputs(torch.float64)

    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # Squared, so that there is a second derivative.
        outs = apply_rotary(q * 1, k * 1, cos.double(), sin.double(), inplace=inplace)
        return outs[0].square(), outs[1].square()

    leaves = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradcheck(rotated, leaves)
    assert torch.autograd.gradgradcheck(rotated, leaves)


def test_tables_that_require_grad_get_their_gradients() -> None:
    q, k, cos, sin = (x.double().requires_grad_() for x in SMALL.inputs(torch.float64))
    assert torch.autograd.gradcheck(
        lambda *args: apply_rotary(*args, inplace=True), (q, k, cos, sin)
    )


# Every kind that a LLaMA config can name and that needs no more than a factor.
@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("first", [40, 100_000])
def test_equals_transformers_for_every_kind_of_table(rope_type: str, first: int) -> None:
    scaling: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type != "default":
        scaling |= {"factor": 4.0, "original_max_position_embeddings": 32}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=scaling,
    )
    q, k = (draw(50, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2))
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(first, first + 50)[None])
    heads_first = (x.transpose(0, 1)[None] for x in (q, k))
    expected = apply_rotary_pos_emb(*heads_first, cos, sin)
    for out, other in zip(apply_rotary(q, k, cos, sin, inplace=False), expected, strict=True):
        torch.testing.assert_close(out, other[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_half_precision_is_nearer_to_the_truth_than_transformers() -> None:
    case = RotaryCase("nearer", 64, 4, 2, 64, table_dtype=None)
    q, k, cos, sin = case.inputs(torch.bfloat16)
    truth = torch.einsum("nij,nhj->nhi", rotation(cos, sin), q.double())
    ours = apply_rotary(q, k, cos, sin, inplace=False)[0]
    theirs = apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)[0]
    errors = [(x.double() - truth).norm() for x in (ours, theirs[0].transpose(0, 1))]
    assert errors[0] < 0.8 * errors[1]


class Projections(nn.Module):
    """Projects to q and k as a LLaMA layer does, rotates, and mixes both into one output."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, SMALL.num_heads * SMALL.head_dim, bias=bias)
        self.k_proj = nn.Linear(12, SMALL.num_kv_heads * SMALL.head_dim, bias=bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
        q, k = (proj(hidden).view(SMALL.total, -1, 8) for proj in (self.q_proj, self.k_proj))
        out_q, out_k = apply_rotary(q, k, cos, sin, inplace=inplace)
        if inplace:
            assert (out_q.data_ptr(), out_k.data_ptr()) == (q.data_ptr(), k.data_ptr())
        return torch.cat([out_q, out_k], 1).sin()


def gradients(module: Projections, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(module.parameters())))


# With a bias the projection itself hands over a view.
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_projections_are_written_over_without_a_copy_in_autograd(bias: bool) -> None:
    module = Projections(bias)
    hidden = draw(1, SMALL.total, 12, seed=1, dtype=torch.float32)
    cos, sin = SMALL.inputs(torch.float32)[2:]
    q = module.q_proj(hidden).view(SMALL.total, -1, 8)
    k = module.k_proj(hidden).view(SMALL.total, -1, 8)
    with version_bumped(q, k):
        outs = apply_rotary(q, k, cos, sin, inplace=True)
    for out, x in zip(outs, (q, k), strict=True):
        assert out.data_ptr() == x.data_ptr()
        # A view of what was rotated: no CopySlices, no AsStrided, either of which would copy.
        assert type(out.grad_fn).__name__ == "ViewBackward0"
        assert type(out.grad_fn.next_functions[0][0]).__name__ == "_RotaryBackward"
    expected = gradients(module, module(hidden, cos, sin, False))
    for one, other in zip(gradients(module, module(hidden, cos, sin, True)), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradients_are_equal_under_checkpointing(use_reentrant: bool) -> None:
    module = Projections(bias=False)
    hidden = draw(1, SMALL.total, 12, seed=1, dtype=torch.float32).requires_grad_()
    cos, sin = SMALL.inputs(torch.float32)[2:]
    expected = gradients(module, module(hidden, cos, sin, True))
    out = checkpoint(module, hidden, cos, sin, True, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for one, parameter in zip(expected, module.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, one)


def test_autocast_leaves_dtypes_alone() -> None:
    module = Projections(bias=False)
    hidden = draw(1, SMALL.total, 12, seed=1, dtype=torch.float32)
    cos, sin = SMALL.inputs(torch.float32)[2:]
    with torch.autocast("cpu", torch.bfloat16):
        q, k = (proj(hidden).view(5, -1, 8) for proj in (module.q_proj, module.k_proj))
        before = q.detach().clone()
        out_q, out_k = apply_rotary(q, k, cos, sin, inplace=True)
        assert out_q.dtype == out_k.dtype == torch.bfloat16
    assert_rounded_once("q", out_q, before, rotation(cos, sin))
    out_q.sum().backward()
    assert module.q_proj.weight.grad is not None
    assert module.q_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_views_and_leaves_are_written_over(mode: Any) -> None:
    q0, k0, cos, sin = SMALL.inputs(torch.float32)
    with mode():
        q, k = q0.clone(), k0.clone()
        outs = apply_rotary(q, k, cos, sin, inplace=True)
    assert [out.data_ptr() for out in outs] == [q.data_ptr(), k.data_ptr()]
    assert_rounded_once("q", q, q0, rotation(cos, sin))
    assert_rounded_once("k", k, k0, rotation(cos, sin))


def test_version_counter_counts_the_write_without_grad_too() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    with torch.no_grad(), version_bumped(q, k):
        apply_rotary(q, k.requires_grad_(), cos, sin, inplace=True)


def test_an_operation_that_saved_q_raises_in_its_backward() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    product = q.requires_grad_() * 1
    saved = product.square()
    out, _ = apply_rotary(product, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved.sum() + out.sum()).backward()


def test_results_may_be_written_to() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    for inplace in (False, True):
        leaf = q.clone().requires_grad_()
        out_q, out_k = apply_rotary(leaf * 1, k.clone(), cos, sin, inplace=inplace)
        out_q.mul_(2)
        out_k.mul_(2)
        out_q.sum().backward()
        assert leaf.grad is not None
        assert_rounded_once("dq", leaf.grad, torch.full_like(q, 2.0), rotation(cos, sin).mT)


def _leaf(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.requires_grad_(), k * 1


def _slices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    fused = torch.cat([q, k], 1).requires_grad_() * 1
    return tuple(fused.split((q.shape[1], k.shape[1]), 1))  # type: ignore[return-value]


def _same(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, q


def _expanded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q[:, :1].expand_as(q), k


def _view_of_a_leaf(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.flatten(1).clone().requires_grad_().view(q.shape), k


def _view_of_a_view_that_is_a_leaf(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.flatten(1).requires_grad_().view(q.shape), k


def _some_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.cat([q, q]).requires_grad_() * 1)[: len(q)], k


def _heads_first(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (q.transpose(0, 1).contiguous().requires_grad_() * 1).transpose(0, 1), k


def _outside_the_graph(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    product = q.requires_grad_() * 1
    with torch.no_grad():
        view = product.view(q.shape)
    return view, k.requires_grad_() * 1


def _inference(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return q.clone(), k.clone()


@pytest.mark.parametrize(
    "lay_out",
    [
        _leaf,
        _view_of_a_leaf,
        _view_of_a_view_that_is_a_leaf,
        _slices,
        _some_rows,
        _heads_first,
        _same,
        _expanded,
        _outside_the_graph,
        _inference,
    ],
)
def test_what_may_not_be_written_over_stays(lay_out: Any) -> None:
    q0, k0, cos, sin = SMALL.inputs(torch.float32)
    q, k = lay_out(q0, k0)
    before = q.clone(), k.clone()
    outs = apply_rotary(q, k, cos, sin, inplace=True)
    for out, x, kept in zip(outs, (q, k), before, strict=True):
        assert torch.equal(x, kept)
        assert_rounded_once("out", out, kept, rotation(cos, sin))


def test_gradients_of_slices_of_one_product_are_right() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    fused = torch.cat([q, k, k], 1).requires_grad_()
    parts = (fused * 1).split((3, 2, 2), 1)
    outs = apply_rotary(parts[0], parts[1], cos, sin, inplace=True)
    dout = draw(*fused.shape, seed=5, dtype=torch.float32)
    (grad,) = torch.autograd.grad(torch.cat([*outs, parts[2]], 1), fused, dout)
    assert_rounded_once("q, k", grad[:, :5], dout[:, :5], rotation(cos, sin).mT)
    assert torch.equal(grad[:, 5:], dout[:, 5:])


def test_gradients_that_a_hook_keeps_or_two_branches_share_stay() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    leaf, other = q.clone().requires_grad_(), q.clone().requires_grad_()
    kept: list[Tensor] = []
    out, _ = apply_rotary(leaf * 1, k, cos, sin, inplace=True)
    out.register_hook(kept.append)
    dout = draw(*q.shape, seed=5, dtype=torch.float32)
    before = dout.clone()
    # The sum hands one gradient to both.
    (out + other).backward(dout)
    assert torch.equal(kept[0], before)
    assert other.grad is not None and torch.equal(other.grad, before)


def test_a_second_backward_gives_the_same_gradients() -> None:
    q, k, cos, sin = SMALL.inputs(torch.float32)
    leaf = q.requires_grad_()
    out, _ = apply_rotary(leaf * 1, k, cos, sin, inplace=True)
    first = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), leaf)[0])


def test_rotating_twice_adds_the_angles() -> None:
    q, k, *_ = SMALL.inputs(torch.float32)
    angle = draw(SMALL.total, 4, seed=5, dtype=torch.float32).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    twice = apply_rotary(*apply_rotary(q, k, cos, sin, inplace=False), cos, sin, inplace=True)
    once = apply_rotary(q, k, (2 * angle).cos(), (2 * angle).sin(), inplace=False)
    for one, other in zip(twice, once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph_for_every_number_of_tokens() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(apply_rotary, fullgraph=True, dynamic=True, backend=count)
    for total in (7, 12, 33):
        case = RotaryCase("compiled", total, 3, 2, 8)
        q, k, cos, sin = case.inputs(torch.float32)
        for out, x in zip(compiled(q, k, cos, sin, inplace=True), (q, k), strict=True):
            assert_rounded_once("out", out, x, rotation(cos, sin))
    assert len(graphs) == 1


def test_a_trace_computes_for_other_inputs() -> None:
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q, k, cos, sin, inplace=True)

    inputs = SMALL.inputs(torch.float32)
    traced = torch.jit.trace(rotated, inputs, check_trace=False)
    q, k, cos, sin = (2 - x for x in inputs)
    for out, x in zip(traced(q, k, cos, sin), (q, k), strict=True):
        assert_rounded_once("out", out, x, rotation(cos, sin))


def test_subclasses_see_torch_operations_alone() -> None:
    class Sharded(Tensor):
        pass

    q, k, cos, sin = SMALL.inputs(torch.float32)
    out, _ = apply_rotary(q.as_subclass(Sharded), k.as_subclass(Sharded), cos, sin, inplace=True)
    assert type(out) is Sharded
    assert_rounded_once("q", out.as_subclass(Tensor), q, rotation(cos, sin))
