"""Padded batches as data, and the comparison of the unpadding kernels with torch's operations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from padless.unpadded import call, structure
from padless.unpadded.ledger import Ledger

IGNORED = -100


@dataclass(frozen=True)
class UnpadCase:
    """A mask by its rows, and what comes with it.

    Attributes:
        rows: a word a row, "x" for a real token.
        dtype: of the mask.
        names: arguments beside the mask.
        strided: whether rows and columns lie apart in memory.
    """

    rows: tuple[str, ...]
    dtype: torch.dtype = torch.int64
    names: tuple[str, ...] = ("input_ids", "labels")
    strided: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return "_".join([*self.rows[:3], kind, *self.names, *["strided"] * self.strided])

    def arguments(self, device: str) -> dict[str, Tensor]:
        """Makes the batch; labels are -100 where they would be compared with padding."""
        real = torch.tensor([[letter == "x" for letter in row] for row in self.rows])
        ids = torch.arange(real.numel()).view(real.shape) + 1000
        front = torch.zeros_like(real)
        front[:, 1:] = real[:, :-1]
        made = {
            "attention_mask": real.to(self.dtype),
            "input_ids": ids,
            "labels": (ids + 1000).masked_fill(~(real & front), IGNORED),
            "shift_labels": (ids + 2000).masked_fill(~real, IGNORED),
        }
        if self.rows[0][0] == "x":
            # The first label of a row is compared with nothing: it may be anything.
            made["labels"][0, 0] = 7
        made = {name: made[name] for name in ("attention_mask", *self.names)}
        if self.strided:
            made = {name: _apart(x) for name, x in made.items()}
        return {name: x.to(device) for name, x in made.items()}


_SHAPES = (
    ("xxx..", "x....", "xxxxx"),
    ("..xxx", "....x", "xxxxx"),
    ("x.x.x", ".xx..", "..x.x"),
    (".....", "xxxxx", "....."),
    ("xxxxx", "xxxxx"),
    ("x",),
    (".", "x", "."),
    ("xxxx", "...x", "x..."),
    ("xxxxxxxxxxxxx.......", "...........xxxxxxxxx"),
)
CASES = (
    *(UnpadCase(rows) for rows in _SHAPES),
    *(UnpadCase(_SHAPES[2], dtype) for dtype in (torch.bool, torch.uint8, torch.int32)),
    UnpadCase(_SHAPES[2], names=("input_ids",)),
    UnpadCase(_SHAPES[2], names=("labels",)),
    UnpadCase(_SHAPES[2], names=("input_ids", "shift_labels")),
    UnpadCase(_SHAPES[2], names=("input_ids", "labels", "shift_labels")),
    UnpadCase(_SHAPES[0], names=("input_ids", "labels", "shift_labels"), strided=True),
    UnpadCase(_SHAPES[0], torch.bool, strided=True),
)


def _apart(x: Tensor) -> Tensor:
    """Copies a tensor into one with room between rows and columns."""
    wide = x.new_zeros(x.shape[0] + 1, 2 * x.shape[1] + 3)
    view = wide[1:, 1 : 2 * x.shape[1] : 2]
    return view.copy_(x)


def random_case(seed: int) -> UnpadCase:
    """Draws a mask of any shape, and which arguments come with it."""
    rng = random.Random(seed)
    width = rng.randint(1, 13)
    rows = tuple("".join(rng.choice("x.") for _ in range(width)) for _ in range(rng.randint(1, 6)))
    names = tuple(n for n in ("input_ids", "labels", "shift_labels") if rng.random() < 0.7)
    return UnpadCase(rows, rng.choice([torch.bool, torch.int64]), names, rng.random() < 0.3)


def assert_same(case: UnpadCase, device: str) -> None:
    """Compares what the door makes by the kernels with what it makes by torch, bit by bit.

    Also with one label more, at every slot in turn: most of them are compared with padding.
    """
    _compare(case.arguments(device), device)
    for name in ("labels", "shift_labels"):
        if name in case.names and len(case.rows) * len(case.rows[0]) <= 15:
            for slot in range(len(case.rows) * len(case.rows[0])):
                arguments = case.arguments(device)
                labels = arguments[name].clone()
                labels.view(-1)[slot] = 5
                _compare({**arguments, name: labels}, device)


def _compare(arguments: dict[str, Tensor], device: str) -> None:
    launched = []
    real = structure.unpad_rows

    def recorded(*args: Any) -> Any:
        launched.append(real(*args))
        return launched[-1]

    with mock.patch.object(structure, "unpad_rows", recorded):
        got = _flat(arguments, device)
    assert len(launched) == 1 and launched[0] is not None
    with mock.patch.object(structure, "unpad_rows", lambda *args: None):
        expected = _flat(arguments, device)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


def _flat(arguments: dict[str, Tensor], device: str) -> dict[str, Any]:
    """Runs the door's part up to the model: the flat arguments, the layout, the reason if none."""
    config = SimpleNamespace(output_attentions=False, use_return_dict=True)
    model = SimpleNamespace(
        config=config, training=False, layers=[], embed_tokens=nn.Embedding(1, 1)
    )
    given = dict(arguments)
    if "input_ids" not in given:
        torch.manual_seed(0)
        given["inputs_embeds"] = torch.rand(*given["attention_mask"].shape, 2).to(device)
    ledger = Ledger("auto")
    batch = call.flatten_call(model, given, ledger, _ERA)
    found: dict[str, Any] = {"stock": dict(ledger.stock), "syncs": ledger.host_syncs}
    if batch is None:
        return found
    layout = batch.layout
    found.update(given, syncs=batch.host_syncs, lengths=layout.lengths, total=layout.total)
    found.update(cu_seqlens=layout.cu_seqlens, indices=layout.indices)
    return found


_ERA: Any = SimpleNamespace(cache_attribute=False, name="Q")
