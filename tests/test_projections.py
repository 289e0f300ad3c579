"""q, k and v with their gradients added inside a product: right, and only where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

import padless
from accuracy import draw
from golden.models import build_model
from golden.steps import step_of
from padless.unpadded import projections
from padless.unpadded.projections import project


def _layer(dtype: torch.dtype = torch.float64, bias: bool = False) -> SimpleNamespace:
    torch.manual_seed(0)
    sizes = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
    return SimpleNamespace(
        **{name: nn.Linear(8, size, bias=bias, dtype=dtype) for name, size in sizes.items()}
    )


def _hidden(dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(1, 7, 8, seed=1, dtype=dtype).requires_grad_()


def _by_modules(layer: SimpleNamespace, hidden: Tensor) -> tuple[Tensor, ...]:
    return layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)


def _is_joined(layer: SimpleNamespace, hidden: Tensor) -> bool:
    return type(project(layer, hidden)[0].grad_fn).__name__ == "_ProjectionsBackward"


def _gradients(
    run: Callable[[SimpleNamespace, Tensor], tuple[Tensor, ...]],
    layer: SimpleNamespace,
    used: tuple[int, ...] = (0, 1, 2),
) -> list[Tensor | None]:
    hidden = _hidden()
    weights = [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    outs = run(layer, hidden)
    loss = sum((outs[i] * (i + 1)).square().sum() for i in used)
    wanted = [x for x in (hidden, *weights) if x.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1, 2), (2,)], ids=str)
@pytest.mark.parametrize("frozen", [(), ("q_proj",), ("q_proj", "k_proj", "v_proj")], ids=str)
def test_gradients_are_those_of_the_modules(used: tuple[int, ...], frozen: tuple[str, ...]) -> None:
    layer = _layer()
    for name in frozen:
        getattr(layer, name).weight.requires_grad_(False)
    assert _is_joined(layer, _hidden())
    got, expected = (_gradients(run, layer, used) for run in (project, _by_modules))
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_gradients_of_gradients() -> None:
    layer, hidden = _layer(), _hidden()

    def outs(hidden: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return projections._Projections.apply(hidden, *weights)

    weights = [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    assert torch.autograd.gradcheck(outs, (hidden, *weights))
    assert torch.autograd.gradgradcheck(outs, (hidden, *weights))


def test_input_without_gradient_is_left_to_the_modules() -> None:
    # Of the first layer of a model whose embedding is frozen: there is nothing to add up.
    assert not _is_joined(_layer(), _hidden().detach())
    with torch.no_grad():
        assert project(_layer(), _hidden())[0].grad_fn is None


class _Adapter(nn.Linear):
    """A linear layer of somebody else's."""


def _with(layer: SimpleNamespace, **parts: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(layer), **parts})


def _hooked(register: str) -> SimpleNamespace:
    layer = _layer()
    getattr(layer.v_proj, register)(lambda *_: None)
    return layer


def _normed() -> SimpleNamespace:
    layer = _layer()
    torch.nn.utils.parametrizations.weight_norm(layer.v_proj)
    return layer


def _own_forward() -> SimpleNamespace:
    layer = _layer()
    layer.k_proj.forward = layer.k_proj.forward
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: _layer(bias=True),
        lambda: _with(_layer(), k_proj=_Adapter(8, 4, bias=False, dtype=torch.float64)),
        lambda: _hooked("register_forward_hook"),
        lambda: _hooked("register_forward_pre_hook"),
        lambda: _hooked("register_full_backward_hook"),
        lambda: _hooked("register_full_backward_pre_hook"),
        _own_forward,
        lambda: _with(
            _layer(), v_proj=torch.nn.utils.parametrizations.weight_norm(_layer().v_proj)
        ),
    ],
    ids=["bias", "subclass", "hook", "pre_hook", "backward", "pre_backward", "forward", "norm"],
)
def test_what_is_not_three_plain_products_is_left_to_the_modules(
    make: Callable[[], SimpleNamespace],
) -> None:
    layer = make()
    assert not _is_joined(layer, _hidden())
    for one, other in zip(project(layer, _hidden()), _by_modules(layer, _hidden()), strict=True):
        assert torch.equal(one, other)


def test_global_hooks_see_the_modules() -> None:
    seen = []
    handle = torch_modules.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        project(_layer(), _hidden())
    finally:
        handle.remove()
    assert len(seen) == 3


def test_autocast_is_left_to_the_modules() -> None:
    layer = _layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, _, _ = project(layer, _hidden(torch.float32))
    assert q.dtype == torch.bfloat16


def test_gradients_arrive_in_the_order_of_three_products() -> None:
    # ZeRO-2 fills its buckets in that order. A rank whose batch takes transformers' own path would
    # have other weights in a bucket than the rest, and the sum would be of different things.
    model = build_model().train()
    arrived: list[str] = []
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    step_of(model, "left")
    stock = arrived.copy()
    arrived.clear()
    with padless.patch(model):
        step_of(model, "left")
    assert arrived == stock
