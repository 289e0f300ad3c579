"""`VarlenLayout`: what each way of building it gives, and the moves between padded and packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from padless.layout import VarlenLayout

IDS = torch.int64

# Rows may be all real, all padding, or real anywhere; batches may have no row or no column.
masks = st.integers(0, 4).flatmap(
    lambda seqlen: st.lists(
        st.lists(st.booleans(), min_size=seqlen, max_size=seqlen), min_size=0, max_size=5
    ).map(lambda rows: torch.tensor(rows, dtype=torch.bool).reshape(len(rows), seqlen))
)
many_lengths = st.lists(st.integers(0, 6), min_size=0, max_size=6)
quickly = settings(deadline=None, max_examples=80, database=None, derandomize=True)


def values(*shape: int) -> Tensor:
    """Numbers that are all different and none of them zero."""
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def assert_consistent(layout: VarlenLayout) -> None:
    """Asserts what every layout promises, however it was built."""
    bounds = [0, *np.cumsum(layout.lengths, dtype=int).tolist()]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.is_contiguous()
    assert layout.cu_seqlens.tolist() == bounds
    assert all(type(n) is int for n in layout.lengths)
    assert layout.total == bounds[-1]
    assert layout.max_seqlen == max(layout.lengths, default=0)
    assert layout.padded_total == layout.batch * layout.seqlen
    if layout.indices is None:
        assert layout.total == layout.padded_total
    else:
        assert layout.indices.dtype == torch.int64
        assert layout.indices.shape == (layout.total,)
        assert layout.total < layout.padded_total


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_from_mask_finds_the_tokens_wherever_they_sit(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=dtype)
    layout = VarlenLayout.from_mask(mask)
    assert_consistent(layout)
    assert layout.lengths == (2, 4, 0, 2)
    assert (layout.batch, layout.seqlen) == (4, 4)
    assert layout.indices is not None
    assert layout.indices.tolist() == [2, 3, 4, 5, 6, 7, 12, 14]


def test_from_mask_takes_any_nonzero_integer_as_real() -> None:
    layout = VarlenLayout.from_mask(torch.tensor([[0, 7, -1]]))
    assert layout.lengths == (2,)


def test_from_mask_without_padding_needs_no_indices() -> None:
    layout = VarlenLayout.from_mask(torch.ones(2, 3, dtype=IDS))
    assert_consistent(layout)
    assert layout.indices is None
    assert layout.lengths == (3, 3)


def test_from_rows_is_the_layout_of_a_mask_of_ones() -> None:
    layout = VarlenLayout.from_rows(3, 5)
    assert_consistent(layout)
    assert layout.lengths == (5, 5, 5)
    assert (layout.batch, layout.seqlen) == (3, 5)


@pytest.mark.parametrize("batch, seqlen", [(0, 5), (3, 0), (0, 0)])
def test_from_rows_and_mask_of_an_empty_batch_hold_no_token(batch: int, seqlen: int) -> None:
    mask = torch.ones(batch, seqlen, dtype=torch.bool)
    for layout in (VarlenLayout.from_rows(batch, seqlen), VarlenLayout.from_mask(mask)):
        assert_consistent(layout)
        assert layout.lengths == (0,) * batch
        assert layout.unpad(torch.ones(batch, seqlen, 2)).shape == (0, 2)
        assert layout.pad(torch.ones(0, 2)).shape == (batch, seqlen, 2)


@pytest.mark.parametrize(
    "lengths",
    [[3, 0, 2], (3, 0, 2), np.array([3, 0, 2]), torch.tensor([3, 0, 2])],
    ids=["list", "tuple", "numpy", "tensor"],
)
def test_from_lengths_takes_any_sequence_of_integers(lengths: Any) -> None:
    layout = VarlenLayout.from_lengths(lengths)
    assert_consistent(layout)
    assert layout.lengths == (3, 0, 2)
    assert (layout.batch, layout.seqlen, layout.indices) == (1, 5, None)


def test_from_lengths_puts_the_boundaries_on_the_device() -> None:
    assert VarlenLayout.from_lengths([2], device="meta").cu_seqlens.device.type == "meta"
    assert VarlenLayout.from_rows(1, 2, device="meta").cu_seqlens.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_from_cu_seqlens_keeps_the_boundaries(dtype: torch.dtype) -> None:
    layout = VarlenLayout.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=dtype))
    assert_consistent(layout)
    assert layout.lengths == (3, 0, 2)
    assert (layout.batch, layout.seqlen, layout.indices) == (1, 5, None)


def test_from_cu_seqlens_does_not_follow_a_buffer_that_is_reused() -> None:
    buffer = torch.tensor([0, 9, 3, 9, 5], dtype=torch.int32)
    layout = VarlenLayout.from_cu_seqlens(buffer[::2])
    buffer.fill_(0)
    assert_consistent(layout)
    assert layout.lengths == (3, 2)


@pytest.mark.parametrize(
    "position_ids, lengths, shape",
    [
        ([0, 1, 2, 0, 1, 0], (3, 2, 1), (1, 6)),
        ([[0, 1, 2, 0]], (3, 1), (1, 4)),
        ([[0, 1, 0], [1, 2, 3]], (2, 1, 3), (2, 3)),
        ([[0, 1, 2], [3, 4, 5]], (3, 3), (2, 3)),
        ([[7, 8, 9, 9, 10]], (3, 2), (1, 5)),
        ([[0, 0, 0]], (1, 1, 1), (1, 3)),
    ],
    ids=["flat", "one_row", "rows", "row_continues", "starts_late", "all_restart"],
)
def test_from_position_ids_begins_a_document_at_each_restart(
    position_ids: list[Any], lengths: tuple[int, ...], shape: tuple[int, int]
) -> None:
    layout = VarlenLayout.from_position_ids(torch.tensor(position_ids))
    assert_consistent(layout)
    assert layout.lengths == lengths
    assert (layout.batch, layout.seqlen) == shape


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (0, 0)], ids=str)
def test_from_position_ids_of_an_empty_batch_holds_no_document(shape: tuple[int, ...]) -> None:
    layout = VarlenLayout.from_position_ids(torch.zeros(shape, dtype=IDS))
    assert_consistent(layout)
    assert layout.lengths == ()


@quickly
@given(masks)
def test_pad_of_unpad_keeps_real_tokens_and_zeroes_padding_for_any_mask(mask: Tensor) -> None:
    layout = VarlenLayout.from_mask(mask)
    assert_consistent(layout)
    padded = values(*mask.shape, 2, 3)
    packed = layout.unpad(padded)
    assert torch.equal(packed, padded[mask])
    assert torch.equal(layout.pad(packed), padded * mask[..., None, None])
    assert torch.equal(layout.unpad(layout.pad(packed)), packed)
    assert layout.lengths == tuple(int(row.sum()) for row in mask)


@quickly
@given(many_lengths)
def test_split_cuts_at_the_boundaries_for_any_lengths(lengths: list[int]) -> None:
    layout = VarlenLayout.from_lengths(lengths)
    assert_consistent(layout)
    packed = values(layout.total, 2)
    pieces = layout.split(packed)
    assert [len(piece) for piece in pieces] == lengths
    assert torch.equal(torch.cat([packed[:0], *pieces]), packed)


@quickly
@given(many_lengths)
def test_every_description_of_one_packed_row_gives_one_layout(lengths: list[int]) -> None:
    layout = VarlenLayout.from_lengths(lengths)
    again = VarlenLayout.from_cu_seqlens(layout.cu_seqlens)
    assert again.lengths == layout.lengths
    assert (again.batch, again.seqlen) == (layout.batch, layout.seqlen)
    positions = torch.cat([torch.arange(n) for n in [0, *lengths]])
    # Positions cannot tell of documents without a token.
    assert VarlenLayout.from_position_ids(positions).lengths == tuple(n for n in lengths if n)


@quickly
@given(many_lengths.filter(bool), st.booleans())
def test_a_mask_padded_on_either_side_gives_the_lengths(lengths: list[int], left: bool) -> None:
    columns = torch.arange(max(lengths))
    ends = torch.tensor(lengths)[:, None]
    mask = columns >= max(lengths) - ends if left else columns < ends
    layout = VarlenLayout.from_mask(mask)
    assert_consistent(layout)
    assert layout.lengths == tuple(lengths)


def test_unpad_and_split_of_a_full_batch_copy_nothing() -> None:
    layout = VarlenLayout.from_rows(2, 3)
    padded = values(2, 3, 4)
    packed = layout.unpad(padded)
    assert packed.data_ptr() == padded.data_ptr()
    assert layout.split(packed)[0].data_ptr() == padded.data_ptr()


def test_unpad_takes_tensors_that_are_not_contiguous() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    padded = values(3, 2, 5).transpose(0, 1)
    assert torch.equal(VarlenLayout.from_mask(mask).unpad(padded), padded[mask.bool()])
    assert torch.equal(VarlenLayout.from_rows(2, 3).unpad(padded), padded.reshape(6, 5))


def test_padding_never_reaches_the_packed_tensor_if_it_is_nan() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    padded = values(2, 3, 2).masked_fill(mask[..., None] == 0, float("nan"))
    layout = VarlenLayout.from_mask(mask)
    back = layout.pad(layout.unpad(padded))
    assert torch.equal(back, padded.nan_to_num(0.0))


def test_gradients_flow_through_unpad_and_pad_to_real_tokens_only() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    layout = VarlenLayout.from_mask(mask)
    padded = values(2, 3).requires_grad_()
    layout.pad(layout.unpad(padded) * 3).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, 3.0 * mask)


def test_layouts_compare_by_identity() -> None:
    layout = VarlenLayout.from_lengths([2, 3])
    assert layout == layout
    assert layout != VarlenLayout.from_lengths([2, 3])
    assert len({layout, layout}) == 1


def test_a_layout_survives_being_put_together_anew_field_by_field() -> None:
    # As FSDP with mixed precision does with dataclasses among a model's arguments.
    layout = VarlenLayout.from_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    again = dataclasses.replace(layout)
    fields = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    for copy in (again, dataclasses.replace(again, **fields)):
        assert (copy.lengths, copy.total, copy.max_seqlen) == ((2, 1), 3, 2)
        assert copy.host_cu_seqlens.tolist() == [0, 2, 3]
