"""Token counts out of whatever holds a data set: lengths, examples, columns."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

# What an example's length is read from, the first that is there. A mask goes before the ids, since
# ids that are padded already do not say how many of them are real.
COLUMNS = ("length", "attention_mask", "input_ids")


def read_lengths(dataset: Any) -> Tensor:
    """Reads how many tokens each example has.

    Args:
        dataset: lengths; or examples, which are mappings with one of `COLUMNS` or sequences of
            token ids; or columns of that name, as a tokenizer's answer or `datasets.Dataset` has
            them.

    Returns:
        int64 `(examples,)`, in the order of the data set.

    Raises:
        TypeError: something is no length and no example.
        ValueError: there is no example, one has no token, or no column is known.
    """
    if isinstance(dataset, str) or not (
        isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"dataset must be lengths or tokenised examples, got {type(dataset).__name__}"
        )
    names = dataset if isinstance(dataset, Mapping) else getattr(dataset, "column_names", None)
    if names:
        column = _column(names, "dataset")
        found = [_count(column, value, n) for n, value in enumerate(dataset[column])]
    else:
        found = [_length(item, n) for n, item in enumerate(_items(dataset))]
    if not found:
        raise ValueError("dataset must hold at least one example, got none")
    shortest = min(found)
    if shortest < 1:
        raise ValueError(
            f"lengths must be 1 or more, got {shortest} for example {found.index(shortest)}; "
            f"leave such examples out"
        )
    return torch.tensor(found, dtype=torch.int64)


def _items(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, Tensor):
        return dataset.tolist()
    if isinstance(dataset, Iterable):
        return dataset
    # A map-style data set of torch: its indices need not end in an IndexError.
    return (dataset[index] for index in range(len(dataset)))


def _column(names: Iterable[Any], where: str) -> str:
    names = list(names)
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"{where} must have one of {', '.join(COLUMNS)}, got {', '.join(map(str, names))}; "
        f"tokenise it first"
    )


def _length(item: Any, number: int) -> int:
    if isinstance(item, Mapping):
        column = _column(item, f"example {number}")
        return _count(column, item[column], number)
    if isinstance(item, str):
        raise TypeError(f"examples must be token ids, got text for example {number}; tokenise it")
    if hasattr(item, "shape") and len(item.shape) == 0:
        return _whole(item, number)
    return _tokens(item) if isinstance(item, Sized) else _whole(item, number)


def _count(column: str, value: Any, number: int) -> int:
    if column == "length":
        return _whole(value, number)
    if column == "attention_mask":
        return int((torch.as_tensor(value) != 0).sum())
    if not isinstance(value, Sized):
        raise TypeError(
            f"input_ids must be token ids, got {type(value).__name__} for example {number}"
        )
    return _tokens(value)


def _tokens(ids: Any) -> int:
    # A tokenizer's return_tensors leaves a batch dimension of 1.
    return math.prod(ids.shape) if hasattr(ids, "shape") else len(ids)


def _whole(value: Any, number: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"lengths must be whole numbers, got {value!r} for example {number}"
        ) from None
