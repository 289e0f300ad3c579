"""Which of a rank's queries see which of another rank's keys: pure functions of a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from padless.parallel.split import Piece, SequenceSplit

Range = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Queries of one rank and keys of another, every one of which each of them sees.

    Attributes:
        queries: for each sequence, where its queries are among the rank's tokens; ascending.
        keys: for each sequence, where its keys are among the other rank's shared tokens.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]


def local_lengths(split: SequenceSplit, rank: int) -> list[int]:
    """Counts the tokens that a rank has of each of its documents.

    Its pieces of a document are in order: within them, attention is the plain causal one.
    """
    counts: dict[int, int] = {}
    for piece in split.pieces[rank]:
        counts[piece.document] = counts.get(piece.document, 0) + piece.tokens
    return list(counts.values())


def visible_blocks(
    split: SequenceSplit, rank: int, source: int, *, causal: bool = True
) -> list[Block]:
    """Lists what a rank's queries see of another rank's keys.

    Pieces of two ranks never overlap, so that a query sees either all of a piece or nothing of it,
    and of a document's pieces those in front of its own: a prefix. Queries with the same prefix
    make one sequence. Those of one document with different prefixes would need the same keys in two
    sequences of one call, and go to different blocks; the splits of this package make one block.

    Args:
        split: of the flat row.
        rank: whose queries.
        source: whose keys; another rank.
        causal: whether queries see no later keys.
    """
    theirs: dict[int, list[tuple[Piece, Range]]] = {}
    for piece, place in _places(split.shared(source)):
        theirs.setdefault(piece.document, []).append((piece, place))
    rounds: list[dict[str, list[Range]]] = []
    used: dict[int, int] = {}
    last: tuple[int, Range] | None = None
    for piece, place in _places(split.pieces[rank]):
        keys = _prefix(theirs.get(piece.document, []), piece, causal)
        if keys is None:
            continue
        if last == (piece.document, keys):
            # Behind the queries that see the same: one sequence.
            found = rounds[used[piece.document] - 1]["queries"]
            found[-1] = (found[-1][0], place[1])
            continue
        number = used.get(piece.document, 0)
        if number == len(rounds):
            rounds.append({"queries": [], "keys": []})
        rounds[number]["queries"].append(place)
        rounds[number]["keys"].append(keys)
        used[piece.document] = number + 1
        last = (piece.document, keys)
    return [Block(tuple(each["queries"]), tuple(each["keys"])) for each in rounds]


def _prefix(theirs: list[tuple[Piece, Range]], piece: Piece, causal: bool) -> Range | None:
    seen = [place for other, place in theirs if not causal or other.stop <= piece.start]
    return (seen[0][0], seen[-1][1]) if seen else None


def _places(pieces: Iterable[Piece]) -> list[tuple[Piece, Range]]:
    pieces = list(pieces)
    ends = list(accumulate(piece.tokens for piece in pieces))
    return [(piece, (end - piece.tokens, end)) for piece, end in zip(pieces, ends, strict=True)]
