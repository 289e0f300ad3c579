"""What a patched model is handed unasked: arguments, 4D masks, implementations by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from golden import oracle
from golden.models import PATHS, batch, build_model, judge, since
from golden.steps import judge_step_of, step_of, unpadding
from padless.llama import forward, forward_2

pytestmark = pytest.mark.case("patch")


def _logits_or_error(model: torch.nn.Module, real: Tensor, **options: Any) -> Any:
    ids, _ = batch("left")
    options = {"attention_mask": real.long(), "return_dict": True, **options}
    try:
        return model(input_ids=ids, **options).logits[real]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    ("value", "is_served"),
    [
        pytest.param(3, True, id="number"),
        pytest.param(torch.tensor(3.0), True, id="scalar"),
        # One that may go by the slots of the padded batch.
        pytest.param(torch.ones(3, 13), False, id="tensor"),
    ],
)
def test_an_argument_of_a_later_transformers(value: Any, is_served: bool) -> None:
    # Versions that take none raise TypeError, patched or not.
    model = build_model()
    _, real = batch("left")
    want = _logits_or_error(model, real, of_a_later_version=value)
    with padless.patch(model) as handle:
        got = _logits_or_error(model, real, of_a_later_version=value)
        report = handle.report()
    if not isinstance(want, Tensor):
        assert got is want and report.forwards == 0
        return
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert report.forwards == int(is_served)
    assert report.stock == ({} if is_served else {"the argument of_a_later_version": 1})


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_ignores_arguments_of_a_later_transformers(path: str) -> None:
    layer = build_model().model.layers[0].self_attn
    _, real = batch("left")
    hidden, positions = torch.randn(3, 13, 64), torch.arange(13)[None].expand(3, -1)
    function = {"sdpa": forward_2, "flash": forward}[path]
    out = function(layer, hidden, real, positions, of_a_later_version=3, and_a=torch.ones(3, 13))[0]
    baseline, truth = oracle.layer_truth(layer, hidden, oracle.causal_visible_keys(real))
    judge(path, out[real], baseline[real], truth[real])


@pytest.mark.parametrize("kind", ["additive", "bool", "not causal"])
def test_a_mask_of_four_dimensions_is_transformers_own_business(kind: str) -> None:
    model = build_model()
    _, real = batch("left")
    visible = oracle.causal_visible_keys(real)
    if kind == "not causal":
        visible = visible | real[:, None, None]
    mask = visible
    if kind != "bool":
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    want = _logits_or_error(model, real, attention_mask=mask)
    with padless.patch(model) as handle:
        got = _logits_or_error(model, real, attention_mask=mask)
        report = handle.report()
    assert torch.equal(got, want) if isinstance(want, Tensor) else got is want
    assert report.forwards == 0
    assert report.stock == {"an attention_mask that is not (batch, seqlen)": 1}


@since("4.36", "the choice of implementation")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_whatever_implementation_is_configured(implementation: str, padding: str) -> None:
    # By name alone, behind transformers' check for packages and GPUs: none of them is run.
    model = build_model().train()
    stock = step_of(model, padding)
    model.config._attn_implementation = implementation
    for name in ("flash_attention_2", "sdpa"):
        # Where versions up to 4.47 keep the choice.
        setattr(model.model, f"_use_{name}", name == implementation)
    with unpadding(model):
        got = step_of(model, padding)
    judge_step_of(model, padding, got, stock)
