"""A call whose steps are replays reads a token late whether it is over; no result tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from golden.generating import IS_FAST, generate
from golden.models import build_model
from graph_cases import plant_graphs

pytestmark = [
    pytest.mark.case("generate"),
    pytest.mark.skipif(not IS_FAST, reason="left to transformers"),
]

PROMPT, MOST = 13, 30


def _seeded(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Gives tokens, and what the generator draws next."""
    torch.manual_seed(3)
    return generate(model, new=MOST, **options), torch.rand(4)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("ends", [True, False], ids=["ends", "most"])
def test_tokens_and_later_draws_are_those_of_the_unpatched_model(
    ends: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    if ends:
        plain = _seeded(model, **options)[0][:, PROMPT:].tolist()
        # All rows end some steps before the most.
        last = [row[number] for row, number in zip(plain, (9, 12, 6), strict=True)]
        options = {**options, "eos_token_id": last}
    want, drawn = _seeded(model, **options)
    assert (want.shape[1] < PROMPT + MOST) is ends
    plant_graphs(monkeypatch)
    with padless.patch(model) as handle:
        got, drawn_too = _seeded(model, **options)
        report = handle.report()
    assert torch.equal(got, want) and got.is_contiguous() and torch.equal(drawn_too, drawn)
    # The one step too many says that the end was indeed read late.
    assert report.decoding_steps == want.shape[1] - PROMPT - 1 + ends
