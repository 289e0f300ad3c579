"""`model.generate` gives the tokens that it gave, and that every transformers version gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden.models import HEADS, PATHS, batch, both, build_model, patched, since

pytestmark = pytest.mark.case("generate")

GOLDEN = Path(__file__).with_name("greedy.json")


def _generate(model: torch.nn.Module, padding: str, **options: Any) -> Tensor:
    ids, real = batch(padding)
    torch.manual_seed(7)
    return model.generate(
        input_ids=ids, attention_mask=real.long(), max_new_tokens=24, pad_token_id=0, **options
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("path", ["stock", *PATHS])
def test_greedy_tokens_are_the_golden_ones(heads: str, path: str) -> None:
    model = build_model(heads)
    want = torch.tensor(json.loads(GOLDEN.read_text())[heads])
    if path == "stock":
        got = _generate(model, "left", do_sample=False)
    else:
        with patched(path):
            got = _generate(model, "left", do_sample=False)
    assert torch.equal(got[:, -24:], want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True, "temperature": 0.8, "top_k": 20}, id="sampled"),
        pytest.param({"do_sample": False, "num_beams": 3}, id="beam"),
        pytest.param({"do_sample": False, "use_cache": False}, id="no-cache"),
        pytest.param(
            {"do_sample": True, "num_return_sequences": 2, "top_k": 20}, id="two-sequences"
        ),
    ],
)
def test_generate_equals_unpatched(path: str, padding: str, options: dict[str, Any]) -> None:
    model = build_model()
    stock, got = both(path, lambda: _generate(model, padding, **options))
    assert torch.equal(got, stock)


@since("4.38", "StaticCache")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_with_a_static_cache_equals_dynamic(path: str, padding: str) -> None:
    # Compared with the unpatched model on its default cache: with a static one and no padding,
    # 4.40 attends to empty slots. A fresh model: 4.38 to 4.40 leave the cache on the layers.
    want = _generate(build_model(), padding, do_sample=False)
    model = build_model()
    with patched(path):
        got = _generate(model, padding, do_sample=False, cache_implementation="static")
    assert torch.equal(got, want)
