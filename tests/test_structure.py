"""Where a batch's real tokens and documents are, against a reading slot by slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from padless.layout import VarlenLayout
from padless.unpadded.structure import IGNORED, Structure, flatten_labels, read_structure

CPU = torch.device("cpu")


def _read(rows: int, seqlen: int, **given: Any) -> Structure:
    return read_structure(rows, seqlen, CPU, **given)


def _layout(rows: int, seqlen: int, **given: Any) -> VarlenLayout:
    found = _read(rows, seqlen, **given)
    assert found.layout is not None, found.reason
    assert (found.reason, found.host_syncs) == ("", 0)
    return found.layout


def _check(layout: VarlenLayout, real: Tensor, lengths: list[int]) -> None:
    """Compares a layout with the real slots and the lengths of the documents, empty ones aside."""
    assert (layout.batch, layout.seqlen) == tuple(real.shape)
    assert [length for length in layout.lengths if length] == lengths
    assert layout.cu_seqlens.dtype == torch.int32
    sums = torch.tensor([0, *layout.lengths]).cumsum(0)
    assert torch.equal(layout.cu_seqlens.long(), sums)
    if real.all():
        assert layout.indices is None
    else:
        assert layout.indices is not None and layout.indices.dtype == torch.int64
        assert torch.equal(layout.indices, real.flatten().nonzero().squeeze(1))


def _split(real: Tensor, numbers: Tensor) -> list[int]:
    """Counts real tokens of each document, where numbers tell documents apart within a row."""
    lengths: list[int] = []
    for row, (is_real, of_row) in enumerate(zip(real.tolist(), numbers.tolist(), strict=True)):
        before = None
        for there, number in zip(is_real, of_row, strict=True):
            if there and (row, number) != before:
                lengths.append(0)
                before = (row, number)
            lengths[-1:] = [lengths[-1] + 1] if there else lengths[-1:]
    return lengths


@st.composite
def _masks(draw: st.DrawFn) -> Tensor:
    rows, seqlen = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=seqlen, max_size=seqlen)
    real = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
    # A batch without a real token has a test of its own.
    return real if real.any() else ~real


@given(_masks(), st.sampled_from([torch.bool, torch.int64, torch.int32, torch.uint8]))
def test_mask(real: Tensor, dtype: torch.dtype) -> None:
    layout = _layout(*real.shape, key_padding_mask=real.to(dtype))
    _check(layout, real, [n for n in real.sum(1).tolist() if n])
    # A row that is all padding is an empty sequence.
    assert list(layout.lengths) == real.sum(1).tolist()
    assert list(layout.lengths) == list(VarlenLayout.from_mask(real).lengths)


@given(_masks(), st.data())
def test_cu_seqlens(real: Tensor, data: st.DataObject) -> None:
    rows, seqlen = real.shape
    edges = data.draw(st.lists(st.booleans(), min_size=rows * seqlen, max_size=rows * seqlen))
    starts = torch.tensor(edges).view(rows, seqlen)
    starts[:, 0] = True
    bounds = [*starts.flatten().nonzero().squeeze(1).tolist(), rows * seqlen]
    # Some documents are empty.
    bounds = sorted([*bounds, *data.draw(st.lists(st.sampled_from(bounds), max_size=2))])
    given: dict[str, Any] = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    if data.draw(st.booleans()):
        given["cu_seqlens_k"] = given["cu_seqlens"].long()
    numbers = starts.cumsum(1)
    _check(_layout(rows, seqlen, key_padding_mask=real, **given), real, _split(real, numbers))
    everything = torch.ones_like(real)
    without = _layout(rows, seqlen, **given)
    _check(without, everything, _split(everything, numbers))


@given(_masks(), st.data())
def test_positions_that_restart(real: Tensor, data: st.DataObject) -> None:
    rows, seqlen = real.shape
    position_ids = torch.zeros(rows, seqlen, dtype=torch.long)
    numbers = torch.zeros_like(position_ids)
    by_slot = data.draw(st.booleans())
    for row in range(rows):
        position = data.draw(st.integers(0, 9))
        before = None
        for column in range(seqlen):
            if not real[row, column]:
                position_ids[row, column] = data.draw(st.integers(0, 9))
                continue
            if before is not None:
                position += (column - before) if by_slot else 1
                if data.draw(st.booleans()):
                    position = 0
                    numbers[row, column:] += 1
            position_ids[row, column], before = position, column
    found = _read(rows, seqlen, key_padding_mask=real, position_ids=position_ids)
    still = ((position_ids == 0) | ~real).all(1) & (real.sum(1) > 1)
    if still.any():
        # Documents of one token each, or no positions at all.
        assert found.layout is None and found.reason == "position_ids that are 0 throughout"
    else:
        assert found.layout is not None, found.reason
        _check(found.layout, real, _split(real, numbers))


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        ([5, 5, 5, 5], "neither count on nor restart at 0"),
        ([0, 1, 2, 1], "neither count on nor restart at 0"),
        ([0, 2, 4, 6], "neither count on nor restart at 0"),
        ([3, 2, 1, 0], "neither count on nor restart at 0"),
        ([0, 0, 0, 0], "0 throughout"),
    ],
)
def test_positions_that_mean_nothing(positions: list[int], reason: str) -> None:
    rows = torch.tensor([[0, 1, 2, 3], positions])
    found = _read(2, 4, position_ids=rows)
    assert found.layout is None and reason in found.reason
    # At padding they are nobody's.
    real = torch.tensor([[True] * 4, [False] * 3 + [True]])
    _check(_layout(2, 4, position_ids=rows, key_padding_mask=real), real, [4, 1])


@pytest.mark.parametrize("positions", [[4, 5, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
def test_one_row_of_positions_goes_for_all(positions: list[int]) -> None:
    starts = torch.tensor([p == 0 or i == 0 for i, p in enumerate(positions)])
    given = torch.tensor([positions], dtype=torch.int32)
    layout = _layout(3, 4, position_ids=given)
    real = torch.ones(3, 4, dtype=torch.bool)
    _check(layout, real, _split(real, starts.cumsum(0).expand(3, -1)))


def test_nothing_given_means_whole_rows() -> None:
    layout = _layout(3, 5)
    assert layout.lengths == (5, 5, 5) and layout.indices is None
    assert _layout(3, 5, key_padding_mask=torch.ones(3, 5)).lengths == (5, 5, 5)


def test_no_real_token_is_left_to_the_stock_path() -> None:
    found = _read(2, 3, key_padding_mask=torch.zeros(2, 3))
    assert found.layout is None and found.reason == "a batch without a real token"


def test_boundaries_go_before_positions_and_a_layout_before_both() -> None:
    bounds, positions = torch.tensor([0, 1, 4]), torch.tensor([[0, 1, 0, 1]])
    assert _layout(1, 4, cu_seqlens=bounds, position_ids=positions).lengths == (1, 3)
    mine = VarlenLayout.from_lengths([3, 1])
    assert _read(1, 4, layout=mine, cu_seqlens=bounds, position_ids=positions).layout is mine
    real = torch.tensor([[True, True, False]])
    mine = VarlenLayout.from_mask(real)
    assert _read(1, 3, layout=mine, key_padding_mask=real.long()).layout is mine


@given(_masks(), st.data())
def test_labels_keep_their_pairs(real: Tensor, data: st.DataObject) -> None:
    rows, seqlen = real.shape
    values = st.lists(st.sampled_from([IGNORED, 1, 2, 3]), min_size=seqlen, max_size=seqlen)
    labels = torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))
    # The pairs (slot of the output, label) that the unpatched loss counts.
    counted = [
        (row * seqlen + column - 1, int(labels[row, column]))
        for row in range(rows)
        for column in range(1, seqlen)
        if labels[row, column] != IGNORED
    ]
    found = _read(rows, seqlen, key_padding_mask=real, labels=labels)
    follows = real.clone()
    follows[:, 1:] &= real[:, :-1]
    needs_padding = any(not follows[divmod(slot + 1, seqlen)] for slot, _ in counted)
    if needs_padding:
        assert found.layout is None and "output at padding" in found.reason
        return
    assert found.layout is not None
    flat = flatten_labels(found.layout, labels)
    assert flat.shape == (1, int(real.sum()))
    slots = real.flatten().nonzero().squeeze(1).tolist()
    pairs = [(slots[i - 1], int(flat[0, i])) for i in range(1, flat.shape[1])]
    assert [pair for pair in pairs if pair[1] != IGNORED] == counted
    # Nothing stands in front of the first token, and its label must not matter.
    assert flat[0, 0] == IGNORED


def test_flattening_leaves_the_callers_labels_alone() -> None:
    labels = torch.arange(6).view(2, 3)
    flat = flatten_labels(VarlenLayout.from_rows(2, 3), labels)
    assert flat.tolist() == [[IGNORED, 1, 2, IGNORED, 4, 5]]
    assert torch.equal(labels, torch.arange(6).view(2, 3))
    real = torch.tensor([[True, True, False, True], [False, True, True, True]])
    flat = flatten_labels(VarlenLayout.from_mask(real), torch.arange(8).view(2, 4))
    # Behind a hole, no output of a real token stands in front either.
    assert flat.tolist() == [[IGNORED, 1, IGNORED, IGNORED, 6, 7]]


@given(_masks(), st.data())
def test_shift_labels_are_bound_to_their_own_slot(real: Tensor, data: st.DataObject) -> None:
    values = st.sampled_from([IGNORED, 5])
    flat = data.draw(st.lists(values, min_size=real.numel(), max_size=real.numel()))
    shifted = torch.tensor(flat).view(real.shape)
    found = _read(*real.shape, key_padding_mask=real, shift_labels=shifted)
    assert (found.layout is None) == bool(((shifted != IGNORED) & ~real).any())


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([0, 3, 6], id="over the end of a row"),
        pytest.param([1, 4, 8], id="not from 0"),
        pytest.param([-1, 4, 8], id="from below 0"),
        pytest.param([0, 4, 7], id="not to the end"),
        pytest.param([0, 4, 6, 5, 8], id="decreasing"),
        pytest.param([0, 4, 2**31 - 1], id="out of bounds"),
        pytest.param([0, -3, 4, 8], id="negative"),
        pytest.param([0, 8], id="two rows in one"),
        pytest.param([0], id="one number"),
    ],
)
def test_cu_seqlens_that_do_not_fit_raise(bounds: list[int]) -> None:
    match = r"cu_seq_lens_q must begin at 0.*each of the 2 rows of 4 tokens.*got \[" + str(
        bounds[0]
    )
    with pytest.raises(ValueError, match=match):
        _read(2, 4, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("keys", [[0, 4, 8], [0, 2, 4, 7, 8], [0, 1, 4, 8]])
def test_other_boundaries_of_keys_raise(keys: list[int]) -> None:
    with pytest.raises(ValueError, match="and equal cu_seq_lens_k"):
        _read(2, 4, cu_seqlens=torch.tensor([0, 2, 4, 8]), cu_seqlens_k=torch.tensor(keys))


def test_layout_of_another_batch_or_mask_raises() -> None:
    with pytest.raises(ValueError, match=r"of the batch's shape \(2, 4\), got \(1, 8\)"):
        _read(2, 4, layout=VarlenLayout.from_lengths([3, 5]))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask must hide what layout leaves out"):
        _read(2, 3, layout=VarlenLayout.from_rows(2, 3), key_padding_mask=mask)
    with pytest.raises(ValueError, match="attention_mask must hide what layout leaves out"):
        _read(2, 3, layout=VarlenLayout.from_mask(mask), key_padding_mask=torch.ones(2, 3))
