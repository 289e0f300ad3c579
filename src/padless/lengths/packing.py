"""How many rows of a fixed length a data set packs into."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor


def packed_rows(lengths: Tensor, max_length: int) -> int:
    """Counts the rows that best-fit decreasing packing fills.

    Examples go in from the longest to the shortest, each into the fullest row that still has room
    for it; none is cut.

    Args:
        lengths: int64 `(examples,)`, each at most `max_length`.
        max_length: tokens a row.

    Returns:
        The number of rows.
    """
    values, counts = torch.unique(lengths, return_counts=True)
    rows = 0
    room: list[int] = []  # tokens left, ascending, each value once
    with_room: dict[int, int] = {}  # rows by tokens left

    def leave(left: int, count: int) -> None:
        if left and count:
            if left not in with_room:
                bisect.insort(room, left)
            with_room[left] = with_room.get(left, 0) + count

    for length, count in zip(values.flip(0).tolist(), counts.flip(0).tolist(), strict=True):
        while count:
            place = bisect.bisect_left(room, length)
            if place < len(room):
                left = room.pop(place)
                available = with_room.pop(left)
            else:
                left, available = max_length, count
            # A row that took one example is fuller than any other with room, and takes the next.
            fits = left // length
            full, rest = divmod(count, fits)
            full = min(full, available)
            used = full
            leave(left - fits * length, full)
            count -= full * fits
            if full < available and 0 < count < fits:
                leave(left - rest * length, 1)
                used, count = used + 1, 0
            if left == max_length:
                rows += used
            else:
                leave(left, available - used)
    return rows
