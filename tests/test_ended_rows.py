"""Rows of a `generate` call that have ended: which ones are left out, when, and what is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from padless.generation.store import RaggedStore
from padless.layout import VarlenLayout
from padless.unpadded import ended
from padless.unpadded.ended import EndedRows
from padless.unpadded.generate import _end_tokens

LENGTHS = (5, 1, 3, 4, 2, 5, 1, 2)


@pytest.fixture(autouse=True)
def _asked_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 1)


def _store() -> tuple[RaggedStore, Tensor]:
    mask = torch.stack([torch.arange(5) >= 5 - n for n in LENGTHS])
    layout = VarlenLayout.from_mask(mask)
    k = torch.randn(layout.total, 2, 8)
    store = RaggedStore(layout, 1)
    store.put_prompt(0, k, k)
    return store, layout.pad(k).transpose(1, 2)


def _step(rows: EndedRows, store: RaggedStore, ids: list[int]) -> Tensor:
    """Runs a step with keys that are the row's number; returns its token ids as computed."""
    given = torch.tensor(ids)[:, None]
    rows.see(given)
    rows.leave_out(store)
    store.begin_step(with_mask=False)
    number = rows.pick(torch.arange(8.0))
    k = number[:, None, None].expand(-1, 2, 8)
    store.put_newest(0, k, k)
    store.count_step()
    return rows.pick(given)


def test_rows_are_left_out_by_halves_and_the_rest_goes_on() -> None:
    store, k = _store()
    rows = EndedRows(torch.tensor([7, 9]), 8)
    assert _step(rows, store, [1, 7, 1, 9, 1, 1, 1, 1]).shape == (8, 1)  # two of eight
    assert _step(rows, store, [1, 0, 7, 0, 1, 1, 1, 1]).shape == (8, 1)  # three
    assert _step(rows, store, [2, 0, 0, 0, 3, 4, 9, 5]).flatten().tolist() == [2, 3, 4, 5]
    assert rows.kept is not None and rows.kept.tolist() == [0, 4, 5, 7]
    assert _step(rows, store, [7, 0, 0, 0, 3, 9, 0, 5]).flatten().tolist() == [3, 5]
    # All have ended: generate is about to stop, or has a reason not to.
    assert _step(rows, store, [0, 0, 0, 0, 7, 0, 0, 7]).flatten().tolist() == [7, 7]
    logits = rows.spread(torch.ones(2, 1, 3))
    assert logits.sum((1, 2)).tolist() == [0, 0, 0, 0, 3, 0, 0, 3]
    assert store.rows.lengths.tolist() == [LENGTHS[4] + 5, LENGTHS[7] + 5]
    padded = store.padded(0)
    assert padded is not None and padded[0].shape == (8, 2, 10, 8)
    for row, x in enumerate(padded[0]):
        if row in (4, 7):
            assert torch.equal(x[:, :5], k[row]) and (x[:, 5:] == row).all()
        else:
            assert (x == 0).all()


def test_the_device_is_asked_once_in_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 4)
    store, _ = _store()
    rows = EndedRows(torch.tensor([7]), 8)
    counts = [_step(rows, store, [1, 1, 1, 7, 7, 7, 7, 7]).shape[0] for _ in range(5)]
    assert counts == [8, 8, 8, 3, 3]


def test_ids_that_a_caller_writes_over_end_no_row_that_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ended, "_ASK_EVERY", 3)
    store, _ = _store()
    rows = EndedRows(torch.tensor([7]), 8)
    given = torch.empty(8, 1, dtype=torch.int64)
    for ids in ([7, 7, 7, 7, 7, 1, 1, 1], [0, 0, 0, 0, 0, 2, 2, 2], [0, 0, 0, 0, 7, 7, 3, 3]):
        given.copy_(torch.tensor(ids)[:, None])
        rows.see(given)
        # Of the first four the end is hidden: they go on as padding, as for a while anyway.
        rows.leave_out(store)
        assert rows.kept is None
    assert rows._ended.nonzero().flatten().tolist() == [4, 5]


def test_a_capture_has_to_pay_for_itself() -> None:
    class OnCuda(EndedRows):
        @property
        def _ended(self) -> Any:
            return self.__dict__["flags"]

        @_ended.setter
        def _ended(self, value: Tensor) -> None:
            class Flags(Tensor):
                is_cuda = True

            self.__dict__["flags"] = value.as_subclass(Flags)

    class Held:
        filled_bytes = 2**30

    rows = OnCuda(torch.tensor([7]), 8)
    rows._steps = 255
    assert not rows._pays(Held())  # type: ignore[arg-type]
    rows._steps = 256
    assert rows._pays(Held())  # type: ignore[arg-type]


def test_no_row_is_left_out_where_that_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = _store()
    rows = EndedRows(torch.tensor([7]), 8)
    monkeypatch.setattr(EndedRows, "_pays", lambda self, store: False)
    assert _step(rows, store, [7, 7, 7, 7, 7, 7, 7, 1]).shape == (8, 1)
    assert rows.kept is None
    monkeypatch.setattr(EndedRows, "_pays", lambda self, store: True)
    assert _step(rows, store, [0, 0, 0, 0, 0, 0, 0, 1]).shape == (1, 1)


def test_what_all_rows_hold() -> None:
    store, _ = _store()
    # k and v, 8 rows of at most 5 tokens, 2 heads of 8 float32.
    assert store.filled_bytes == 2 * 8 * 5 * 2 * 8 * 4


class _Config:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __repr__(self) -> str:
        return f"config {self.__dict__}"


@pytest.mark.parametrize(
    "asked, want",
    [
        ({}, (2,)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": torch.tensor([5, 6])}, (5, 6)),
        ({"eos_token_id": torch.tensor(5)}, (5,)),
        ({"eos_token_id": None}, ()),
        ({"generation_config": _Config(eos_token_id=4)}, (4,)),
        ({"generation_config": _Config(eos_token_id=None)}, ()),
        ({"num_beams": 2}, ()),
        ({"output_scores": True}, ()),
        ({"generation_config": _Config(eos_token_id=4, num_beams=3)}, ()),
    ],
    ids=str,
)
def test_which_tokens_end_a_row(asked: dict[str, Any], want: tuple[int, ...]) -> None:
    model = _Config(generation_config=_Config(eos_token_id=2))
    assert _end_tokens(model, asked) == want
