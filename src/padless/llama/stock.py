"""transformers' own forwards of the classes that are replaced, for calls that are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Filled by an engagement and emptied by its undo; keyed by the class that owns the forward.
_stock: dict[type, Callable[..., Any]] = {}


def remember_stock_forward(cls: type, function: Callable[..., Any]) -> None:
    """Keeps the forward that a class had before it was replaced."""
    _stock[cls] = function


def forget_stock_forwards() -> None:
    """Forgets them all: nothing is replaced any more."""
    _stock.clear()


def stock_forward(cls: type) -> Callable[..., Any] | None:
    """Finds the stock forward of a class or its nearest replaced ancestor."""
    return next((_stock[base] for base in cls.__mro__ if base in _stock), None)
