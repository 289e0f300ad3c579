"""`output_attentions` through the model: the weights of the stock eager implementation."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from golden.models import LAYERS, PADDINGS, PATHS, VERSION, batch, build_model, patched

pytestmark = pytest.mark.case("attentions")


def _attentions(model: torch.nn.Module, padding: str) -> tuple[Tensor, ...]:
    ids, real = batch(padding)
    out = model(ids, attention_mask=real.long(), output_attentions=True, return_dict=True)
    assert len(out.attentions) == LAYERS
    return tuple(weights.transpose(1, 2)[real] for weights in out.attentions)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_are_those_of_eager(path: str, padding: str, mode: str) -> None:
    # The patched model has its default implementation, whose own weights are None from 4.53 on.
    choice = {"attn_implementation": "eager"} if Version("4.36") <= VERSION else {}
    want = _attentions(build_model(**choice).train(mode == "train"), padding)
    model = build_model().train(mode == "train")
    with patched(path):
        got = _attentions(model, padding)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
