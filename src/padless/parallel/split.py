"""Which rank of a sequence group holds which tokens: pure functions of the documents' lengths.

Knows nothing of tensors, processes or models. Both splits give every rank the same number of
tokens, one more at most, since embedding, MLP, head and loss cost the same for each token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

# What balance costs at most: the largest share of the work over the mean.
_BALANCED = 1.05


class Piece(NamedTuple):
    """Neighbouring tokens of one document.

    Attributes:
        document: its number.
        start: of the piece, counted from the document's own first token.
        stop: behind its last token.
    """

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Pairs of a query of the piece and a key that it sees, causally."""
        return (self.stop * (self.stop + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True)
class SequenceSplit:
    """The tokens of each rank, in the order in which the rank holds them.

    Attributes:
        lengths: tokens of each document of the flat row.
        pieces: of each rank; those of one document stand together, in its own order.
    """

    lengths: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def ranks(self) -> int:
        """Size of the group."""
        return len(self.pieces)

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(piece.tokens for piece in own) for own in self.pieces)

    @property
    def costs(self) -> tuple[int, ...]:
        """Pairs of query and key that each rank computes."""
        return tuple(sum(piece.cost for piece in own) for own in self.pieces)

    @property
    def imbalance(self) -> float:
        """The largest cost over the mean one, at least 1."""
        total = sum(self.costs)
        return max(self.costs) * self.ranks / total if total else 1.0

    def shared(self, rank: int) -> tuple[Piece, ...]:
        """Pieces of a rank whose documents other ranks have a part of.

        After `split_balanced` they are a prefix of the rank's pieces, so that no key has to be
        picked out to be sent.
        """
        return tuple(p for p in self.pieces[rank] if len(self._holders[p.document]) > 1)

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """Lists where a rank's pieces begin and end in the flat row, in its order."""
        starts = self._starts
        return [(starts[n] + start, starts[n] + stop) for n, start, stop in self.pieces[rank]]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @cached_property
    def _holders(self) -> dict[int, set[int]]:
        holders: dict[int, set[int]] = {}
        for rank, own in enumerate(self.pieces):
            for piece in own:
                holders.setdefault(piece.document, set()).add(rank)
        return holders


def split_evenly(lengths: Sequence[int], ranks: int) -> SequenceSplit:
    """Cuts the flat row into one stretch a rank: the split of Ulysses.

    Args:
        lengths: tokens of each document.
        ranks: size of the group, at least 1.
    """
    free = _quotas(sum(lengths), ranks)
    pieces: list[list[Piece]] = [[] for _ in free]
    rank = 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            while not free[rank]:
                rank += 1
            stop = min(length, start + free[rank])
            pieces[rank].append(Piece(number, start, stop))
            free[rank] -= stop - start
            start = stop
    return SequenceSplit(tuple(lengths), tuple(map(tuple, pieces)))


def split_balanced(lengths: Sequence[int], ranks: int) -> SequenceSplit:
    """Shares out tokens and causal attention alike: the split of the ring.

    A long document is cut into `2 * ranks` chunks, of which rank r takes number r and number
    `2 * ranks - 1 - r`, whose costs add up to the same for every rank. A short one goes to one rank
    as a whole, where it needs nobody else's keys; a few of them are cut to make totals equal.

    Args:
        lengths: tokens of each document.
        ranks: size of the group, at least 1.

    Returns:
        The split of the longest pieces whose imbalance is at most 1.05; where there is none, the
        one with the least imbalance.
    """
    # Longest first, so that there are short ones left to fill up with.
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    best: tuple[float, list[list[Piece]]] | None = None
    tried: set[int] = set()
    for least in _least_pieces(max(lengths, default=0), ranks):
        cut = sum(length >= 2 * ranks * least for length in lengths)
        if cut in tried:
            continue
        tried.add(cut)
        found = _dealt(lengths, ranks, order, cut)
        if best is None or found[0] < best[0]:
            best = found
        if found[0] <= _BALANCED:
            break
    assert best is not None
    return _ordered(lengths, best[1])


def _least_pieces(longest: int, ranks: int) -> list[int]:
    """Lists what to ask of pieces of a document that is cut, in tokens: powers of 2, descending.

    The first leaves every document whole, but for those that make totals equal. The longer the
    pieces, the fewer documents are cut, whose keys have to travel; and a kernel works on tiles of
    64 to 128 queries, so that shorter pieces would leave it half idle.
    """
    chunks = -(-longest // (2 * ranks))
    return [2**power for power in reversed(range(chunks.bit_length() + 1))]


def _quotas(total: int, ranks: int) -> list[int]:
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _dealt(
    lengths: Sequence[int], ranks: int, order: Sequence[int], cut: int
) -> tuple[float, list[list[Piece]]]:
    """Deals out documents, of which so many in front of the order are cut; gives the imbalance."""
    free = _quotas(sum(lengths), ranks)
    costs = [0] * ranks
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]

    def give(rank: int, piece: Piece) -> None:
        if piece.tokens:
            pieces[rank].append(piece)
            free[rank] -= piece.tokens
            costs[rank] += piece.cost

    for place, number in enumerate(order):
        length = lengths[number]
        if place < cut and ranks > 1:
            _deal(number, length, free, give)
            continue
        start = 0
        while start < length:
            rest = length - start
            room = [rank for rank in range(ranks) if free[rank] >= rest]
            if room:
                rank = min(room, key=lambda r: (costs[r], -free[r]))
            else:
                rank = max(range(ranks), key=lambda r: (free[r], -costs[r]))
            stop = start + min(rest, free[rank])
            give(rank, Piece(number, start, stop))
            start = stop
    total = sum(costs)
    return (max(costs) * ranks / total if total else 1.0), pieces


def _ordered(lengths: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> SequenceSplit:
    """Puts what is shared in front on each rank, and joins neighbours."""
    holders = Counter(number for own in pieces for number in {piece.document for piece in own})
    ordered = tuple(
        tuple(_joined(sorted(own, key=lambda piece: (holders[piece.document] == 1, piece))))
        for own in pieces
    )
    return SequenceSplit(tuple(lengths), ordered)


def _deal(number: int, length: int, free: list[int], give: Callable[[int, Piece], None]) -> None:
    """Cuts a document into chunks from both ends, so that chunks of one rank differ by a token."""
    ranks = len(free)
    shares = _quotas(length, ranks)
    # Who has most room takes the token that is over; nobody takes more than there is room for.
    richest = sorted(range(ranks), key=lambda rank: -free[rank])
    share = dict(zip(richest, shares, strict=True))
    begin, end = 0, length
    for rank in range(ranks):
        front = share[rank] // 2
        back = share[rank] - front
        if rank == ranks - 1:
            # Its two chunks are neighbours.
            give(rank, Piece(number, begin, end))
            return
        give(rank, Piece(number, begin, begin + front))
        give(rank, Piece(number, end - back, end))
        begin, end = begin + front, end - back


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbours of one document."""
    made: list[Piece] = []
    for piece in pieces:
        if made and made[-1].document == piece.document and made[-1].stop == piece.start:
            made[-1] = Piece(piece.document, made[-1].start, piece.stop)
        else:
            made.append(piece)
    return made
