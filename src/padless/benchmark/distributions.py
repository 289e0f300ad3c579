"""Where the lengths of rows come from: a named distribution, or the user's own data."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

# A token alone is predicted by nothing: a row of one has no loss.
SHORTEST = 2
# Of the lognormal one: the long tail of instruction data, most rows short and a few cut at seqlen.
_MEDIAN_SHARE, _SIGMA = 0.25, 0.8


def _uniform(seqlen: int, rng: random.Random) -> int:
    return rng.randint(SHORTEST, seqlen)


def _lognormal(seqlen: int, rng: random.Random) -> int:
    drawn = round(rng.lognormvariate(math.log(_MEDIAN_SHARE * seqlen), _SIGMA))
    return max(SHORTEST, min(seqlen, drawn))


def _full(seqlen: int, rng: random.Random) -> int:
    return seqlen


DISTRIBUTIONS: dict[str, Callable[[int, random.Random], int]] = {
    "uniform": _uniform,
    "lognormal": _lognormal,
    "full": _full,
}


class LengthSource:
    """Draws the lengths of a batch's rows.

    Args:
        seqlen: the longest that a row may be, in tokens.
        distribution: "uniform" from 2 to seqlen; "lognormal", median a quarter of seqlen; "full".
        lengths: the user's own, instead of a distribution: dealt out in random order, all of them
            before any comes again.
        rng: where the draws come from.

    Raises:
        ValueError: no distribution has this name, or a length is not in 2 to seqlen.
    """

    def __init__(
        self,
        seqlen: int,
        *,
        distribution: str = "uniform",
        lengths: Sequence[int] | None = None,
        rng: random.Random,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            known = ", ".join(DISTRIBUTIONS)
            raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
        if lengths is not None:
            check_lengths(lengths, seqlen)
        self._seqlen, self._rng = seqlen, rng
        self._draw = DISTRIBUTIONS[distribution]
        self._own = None if lengths is None else list(lengths)
        self._dealt: list[int] = []

    def draw(self, batch: int) -> tuple[int, ...]:
        """Draws the lengths of a batch of so many rows."""
        return tuple(self._next() for _ in range(batch))

    def _next(self) -> int:
        if self._own is None:
            return self._draw(self._seqlen, self._rng)
        if not self._dealt:
            self._dealt = self._rng.sample(self._own, len(self._own))
        return self._dealt.pop()


def check_lengths(lengths: Sequence[int], seqlen: int | None = None) -> None:
    """Refuses lengths that no row can have.

    Args:
        lengths: in tokens.
        seqlen: the longest that a row may be; None allows any.

    Raises:
        ValueError: there are none, or one is not a whole number from 2 to seqlen.
    """
    if not lengths:
        raise ValueError("lengths must hold at least one number of tokens, got none")
    for at, length in enumerate(lengths):
        if not isinstance(length, int) or isinstance(length, bool) or length < SHORTEST:
            raise ValueError(
                f"lengths must be whole numbers of tokens, {SHORTEST} or more, got {length!r} as "
                f"number {at + 1} of {len(lengths)}"
            )
        if seqlen is not None and length > seqlen:
            raise ValueError(
                f"lengths must be at most seqlen, {seqlen}, got {length} as number {at + 1} of "
                f"{len(lengths)}; raise seqlen or leave it out"
            )


def read_lengths(file: Path) -> list[int]:
    """Reads lengths from a file: one a line, or a JSON list.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no lengths, or something else.
    """
    text = file.read_text(encoding="utf-8").strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"lengths must be a JSON list, got {file} with {error}") from error
    else:
        found = [_number(line.strip()) for line in text.splitlines() if line.strip()]
    check_lengths(found)
    return list(found)


def _number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        # check_lengths says which one it is.
        return text
