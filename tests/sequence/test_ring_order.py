"""Whatever travels in the ring has something to be computed beside it, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from padless.parallel import ring
from padless.parallel.ring_plan import Block, Options, RingPlan, Rows
from padless.parallel.split import split_balanced

OPTIONS = Options(True, 1.0, False, "auto", True)


class Recorder:
    """Stands in for the neighbours, and notes what is begun, computed and waited for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.begun = 0

    def __call__(self, *_: Any) -> Recorder:
        return self

    def start(self, sent: Any, step: int) -> Any:
        self.begun += 1
        self.events.append(("begin", self.begun))
        return self.begun, tuple(torch.zeros_like(x) for x in sent)

    def finish(self, started: Any) -> Any:
        self.events.append(("wait", started[0]))
        return started[1]

    def compute(self, step: int) -> None:
        self.events.append(("compute", step))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(ring, "_Neighbours", found)

    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found.compute(_step(block))
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    def gradients(block: Block, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        found.compute(_step(block))
        return tuple(torch.zeros_like(x) for x in (q, k, v))

    monkeypatch.setattr(Block, "attend", attend)
    monkeypatch.setattr(Block, "gradients", gradients)
    return found


def _step(block: Block) -> int:
    return 0 if block.is_causal else 1


def _run(
    recorder: Recorder,
    rank: int,
    ranks: int,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
) -> list[list[Any]]:
    """Events of the forward and of the backward."""
    split = split_balanced(lengths, ranks)
    plan = RingPlan.of(split, rank, OPTIONS, torch.device("cpu"))
    own = split.totals[rank]
    q, k, v = (torch.randn(own, n, 8, dtype=dtype, requires_grad=True) for n in (4, 2, 2))
    group: Any = SimpleNamespace(rank=rank, size=ranks)
    out = ring.attend_in_ring(q, k, v, plan, group)
    forward = list(recorder.events)
    recorder.events.clear()
    out.sum().backward()
    return [forward, recorder.events]


PLACES = [(rank, ranks) for ranks in (2, 4) for rank in range(ranks)]
# Lengths that 2 and 4 ranks divide: the stand-in gives back what it is sent.
LENGTHS = {"one": [64], "documents": [64, 32, 64]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("rank", "ranks"), PLACES)
def test_something_is_computed_between_the_begin_and_the_end_of_each_exchange(
    recorder: Recorder, rank: int, ranks: int, lengths: list[int]
) -> None:
    for events in _run(recorder, rank, ranks, lengths):
        begun = [number for kind, number in events if kind == "begin"]
        assert begun
        for number in begun:
            first, last = events.index(("begin", number)), events.index(("wait", number))
            between = [kind for kind, _ in events[first:last]]
            assert "compute" in between, f"nothing hides exchange {number} of {events}"


@pytest.mark.parametrize(("rank", "ranks"), PLACES)
def test_each_block_is_computed_once_each_way(recorder: Recorder, rank: int, ranks: int) -> None:
    for events in _run(recorder, rank, ranks, LENGTHS["one"]):
        steps = sorted(number for kind, number in events if kind == "compute")
        assert steps == [0, *[1] * (ranks - 1)]


@pytest.mark.parametrize(("rank", "ranks"), PLACES)
def test_keys_are_fetched_once_less_in_backward(recorder: Recorder, rank: int, ranks: int) -> None:
    forward, backward = _run(recorder, rank, ranks, LENGTHS["one"])
    exchanges = [sum(kind == "begin" for kind, _ in events) for events in (forward, backward)]
    # Backward: sums of each step, and keys of all steps but the first, which are still there.
    assert exchanges == [ranks - 1, (ranks - 1) + (ranks - 2)]


def test_sums_over_ranks_are_rounded_once(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Halves of the distance between two bfloat16 numbers at 1: each for itself is rounded away.
    # In forward the mean of 1 and three times the next number is nearer to that.
    half = 2.0**-8
    parts = iter([1.0, 1.0 + 2 * half, 1.0 + 2 * half, 1.0 + 2 * half])
    shares = iter([1.0, half, half, 0.0])
    sent: list[torch.dtype] = []

    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(q, next(parts)), torch.zeros(q.shape[1], q.shape[0])

    def gradients(block: Block, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        share = next(shares)
        return tuple(torch.full_like(x, share) for x in (q, k, v))

    def start(self: Recorder, tensors: Any, step: int) -> Any:
        sent.append(tensors[0].dtype)
        return 0, tuple(torch.zeros_like(x) for x in tensors)

    monkeypatch.setattr(Block, "attend", attend)
    monkeypatch.setattr(Block, "gradients", gradients)
    monkeypatch.setattr(Recorder, "start", start)
    # Of the last rank, whose queries see keys of every other.
    split = split_balanced([64], 4)
    plan = RingPlan.of(split, 3, OPTIONS, torch.device("cpu"))
    q, k, v = torch.ones(3, 16, 1, 8, dtype=torch.bfloat16).requires_grad_().unbind(0)
    q.retain_grad()
    group: Any = SimpleNamespace(rank=3, size=4)
    out = ring.attend_in_ring(q, k, v, plan, group)
    out.sum().backward()
    assert (out == 1.0 + 2 * half).all()
    assert q.grad is not None and (q.grad == 1.0 + 2 * half).all()
    assert sent.count(torch.float32) == 3


@pytest.mark.parametrize(("ranks", "want"), [(2, torch.bfloat16), (4, torch.float32)])
def test_gradients_of_keys_travel_as_they_are_where_nobody_adds_to_them(
    recorder: Recorder, ranks: int, want: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[torch.dtype] = []
    start = Recorder.start

    def noted(self: Recorder, tensors: Any, step: int) -> Any:
        sent.append(tensors[0].dtype)
        return start(self, tensors, step)

    monkeypatch.setattr(Recorder, "start", noted)
    for rank in range(ranks):
        sent.clear()
        _run(recorder, rank, ranks, [64], torch.bfloat16)
        assert sent[-1] == want
        keys = (ranks - 1) + (ranks - 2)
        assert sent.count(torch.bfloat16) == keys + (ranks - 1 if want == torch.bfloat16 else 0)


@pytest.mark.parametrize("rows", [Rows(slice(2, 5), None), Rows(None, torch.tensor([0, 3, 6]))])
def test_a_total_is_zero_beside_its_first_rows(rows: Rows) -> None:
    part = torch.full((3, 1, 2), 1.5, dtype=torch.bfloat16)
    # Memory that has been used is handed out again.
    used = [torch.full((7, 1, 2), float("nan")) for _ in range(8)]
    del used
    total = rows.add(None, part, 7, torch.float32)
    want = torch.zeros(7, 1, 2)
    want[rows.place] = 1.5
    assert total.dtype == torch.float32 and torch.equal(total, want)
    assert torch.equal(rows.add(total, part, 7, torch.float32), 2 * want)
