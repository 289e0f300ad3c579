"""Which positions and boundaries mean packed documents, which do not, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import padless
from golden.documents import cu_seqlens_of, draw, layout_of, restarting_positions
from golden.models import VOCAB, build_model, run_logits
from golden.steps import said_by_padless, unpadding
from padless import VarlenLayout
from padless.verification import perturbation_probe

pytestmark = pytest.mark.case("packed")


@pytest.mark.parametrize("rows", ["one row", "three rows", "padding between"])
def test_positions_on_padding_say_nothing(rows: str) -> None:
    # A tokenizer that counts real tokens gives padding any position, 0 and 1 among them.
    model = build_model()
    ids, documents = draw(rows)
    real = documents >= 0
    positions = restarting_positions(documents)
    want = None
    with unpadding(model):
        for filler in (0, 1, 5):
            options = {"position_ids": positions.masked_fill(~real, filler)}
            got = run_logits(model, ids, real.long(), **options)
            want = got if want is None else want
            assert torch.equal(got, want)


def test_boundaries_of_keys_alone_part_documents_too() -> None:
    model = build_model()
    ids, documents = draw("three rows")
    with unpadding(model):
        got, want = (
            run_logits(model, ids, None, **{name: cu_seqlens_of(documents)})
            for name in ("cu_seq_lens_k", "cu_seq_lens_q")
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize("source", ["cu_seq_lens", "layout"])
def test_boundary_on_padding_still_parts_documents(source: str) -> None:
    # The second document's first slot is padding, as when each was padded before packing.
    model = build_model()
    ids, _ = draw("one row")
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 5:7] = False
    documents = torch.tensor([[0] * 5 + [1] * 8])
    given: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 5, 13], dtype=torch.int32)}
    given["cu_seq_lens_k"] = given["cu_seq_lens_q"]
    if source == "layout":
        given = {"layout": layout_of(documents.masked_fill(~real, -1))}
    with unpadding(model):
        result = perturbation_probe(
            lambda changed: run_logits(model, changed, real.long(), **given),
            ids,
            real,
            vocab_size=VOCAB,
            documents=documents,
        )
    assert result.passed, str(result)


def test_position_that_goes_back_behind_padding_is_not_served_as_one_document() -> None:
    # The restart itself is on padding: two documents or one, nobody can tell.
    model = build_model()
    ids, _ = draw("one row")
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 5] = False
    positions = torch.tensor([[*range(5), *range(8)]])
    stock = run_logits(model, ids, real.long(), position_ids=positions)
    with padless.patch(model) as handle:
        got = run_logits(model, ids, real.long(), position_ids=positions)
        assert handle.report().forwards == 0
    assert torch.equal(got, stock)


NOT_PACKED = {
    "constant": torch.full((3, 13), 4),
    "zero": torch.zeros(3, 13, dtype=torch.long),
    "back, but not to 0": torch.tensor([[0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8]]).expand(3, -1),
    "steps of two": torch.arange(0, 26, 2)[None].expand(3, -1) % 13,
}


@pytest.mark.parametrize("positions", NOT_PACKED)
def test_odd_positions_take_the_stock_path(
    positions: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model()
    ids, _ = draw("three rows")
    stock = run_logits(model, ids, None, position_ids=NOT_PACKED[positions])
    with padless.patch(model) as handle:
        for _ in range(2):
            got = run_logits(model, ids, None, position_ids=NOT_PACKED[positions])
        assert handle.report().forwards == 0
    assert torch.equal(got, stock)
    (line,) = said_by_padless(caplog)
    assert line.startswith("position_ids that")


def test_positions_of_three_dimensions_are_left_alone() -> None:
    model = build_model()
    ids, documents = draw("three rows")
    positions = restarting_positions(documents)[None].expand(3, -1, -1)

    def run() -> Any:
        try:
            return run_logits(model, ids, None, position_ids=positions)
        except Exception as error:
            return type(error)

    stock = run()
    with padless.patch(model) as handle:
        got = run()
        assert list(handle.report().stock) == ["position_ids that are not (batch, seqlen)"]
    assert torch.equal(got, stock) if isinstance(stock, Tensor) else got is stock


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("shape", ["(1, seqlen)", "(batch, seqlen)"])
def test_positions_that_only_count_on_are_one_document(first: int, shape: str) -> None:
    # Padded to a length that the tables of old versions cover.
    model = build_model()
    ids, _ = draw("three rows")
    ids = torch.cat([ids, torch.zeros(3, 7, dtype=torch.long)], 1)
    real = ids != 0
    positions = (torch.arange(20) + first).masked_fill(torch.arange(20) >= 13, 0)[None]
    if shape == "(batch, seqlen)":
        positions = positions.expand(3, -1)
    stock = run_logits(model, ids, real.long(), position_ids=positions)[real]
    with unpadding(model):
        got = run_logits(model, ids, real.long(), position_ids=positions)[real]
    torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("filler", [0, 1])
def test_positions_that_generate_makes_are_one_document(filler: int) -> None:
    model = build_model()
    ids, documents = draw("padding on the left")
    real = documents >= 0
    positions = (real.long().cumsum(1) - 1).masked_fill(~real, filler)
    stock = run_logits(model, ids, real.long(), position_ids=positions)[real]
    with unpadding(model) as handle:
        got = run_logits(model, ids, real.long(), position_ids=positions)[real]
        assert handle.report().skipped_tokens == int((~real).sum())
    torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        pytest.param(
            {"cu_seq_lens_q": torch.tensor([0, 3, 39], dtype=torch.int32)},
            ValueError,
            "have a boundary at the end of each of the 3 rows of 13 tokens",
            id="over the end of a row",
        ),
        pytest.param(
            {"layout": VarlenLayout.from_lengths([5, 8])},
            ValueError,
            r"layout must be of the batch's shape \(3, 13\), got \(1, 13\)",
            id="of another batch",
        ),
        pytest.param(
            {"layout": VarlenLayout.from_rows(3, 13), "attention_mask": torch.ones(3, 13).tril(9)},
            ValueError,
            "attention_mask must hide what layout leaves out and nothing else",
            id="against the mask",
        ),
        pytest.param(
            {"cu_seq_lens_q": torch.tensor([0, 13, 26, 39]), "output_attentions": True},
            padless.UnsupportedError,
            "output_attentions takes transformers' own path, which would let the documents",
            id="not kept by the stock path",
        ),
    ],
)
def test_boundaries_that_do_not_fit_raise(given: Any, error: type[Exception], text: str) -> None:
    model = build_model()
    ids, _ = draw("three rows")
    if "attention_mask" in given:
        given = {**given, "attention_mask": given["attention_mask"].long()}
    with padless.patch(model), pytest.raises(error, match=text):
        model(input_ids=ids, **given)
