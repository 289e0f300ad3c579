"""`auto` takes the algorithm whose ranks send less: the count is what is really sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.parallel import exchange, ring, ulysses
from padless.parallel.choice import choose_algorithm, sent_by_ring, sent_by_ulysses
from padless.parallel.exchange import Exchange
from padless.parallel.ring_plan import Block, Options, RingPlan, serves_ring
from padless.parallel.split import split_balanced
from padless.unpadded import sharding

LONG, SHORT = [131072], [2000] * 64
# 32 query heads on 8 KV heads, as many KV heads, and fewer of them than 8 ranks.
GROUPED, EQUAL, FEW = (32, 8), (32, 32), (32, 1)


@pytest.mark.parametrize(
    ("lengths", "ranks", "heads", "want"),
    [
        (LONG, 2, GROUPED, "ring"),
        (LONG, 2, EQUAL, "ulysses"),
        # Forward alone the ring would send less.
        (LONG, 4, GROUPED, "ulysses"),
        (LONG, 8, GROUPED, "ulysses"),
        (LONG, 8, EQUAL, "ulysses"),
        # Each KV head would be sent to all ranks.
        (LONG, 8, FEW, "ring"),
        (SHORT, 2, GROUPED, "ring"),
        (SHORT, 2, EQUAL, "ring"),
        (SHORT, 8, EQUAL, "ring"),
        # A long document among short ones is what travels.
        ([100000, *[500] * 60], 8, GROUPED, "ulysses"),
        ([20000, *[2000] * 56], 8, GROUPED, "ring"),
        (LONG, 3, GROUPED, "ring"),
        (SHORT, 64, GROUPED, "ring"),
        (LONG, 1, GROUPED, "ulysses"),
    ],
)
def test_what_is_taken(lengths: list[int], ranks: int, heads: tuple[int, int], want: str) -> None:
    assert choose_algorithm(split_balanced(lengths, ranks), *heads) == want


def test_counts_are_the_formulas_of_the_documentation() -> None:
    n, (h, h_kv) = LONG[0], GROUPED
    for ranks in (2, 4, 8):
        others = (ranks - 1) / ranks
        assert sent_by_ulysses(n, h, h_kv, ranks) == (2 * h + 2 * h_kv) * n / ranks * others
        assert sent_by_ring(split_balanced(LONG, ranks), h_kv) == 2 * h_kv * n * others


CASES = [
    ([64], 2, (4, 2)),
    ([61, 3, 17], 2, (4, 4)),
    ([64], 4, (4, 2)),
    ([50, 1, 1, 20, 30], 4, (8, 1)),
    ([90, 40, 7], 3, (6, 3)),
    ([9] * 8, 2, (4, 2)),
]


@pytest.mark.parametrize(("lengths", "ranks", "heads"), CASES)
def test_ulysses_sends_as_much_as_is_counted(
    lengths: list[int], ranks: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def all_to_all(received: Tensor, data: Tensor, _: Any, sizes: list[int], **__: Any) -> Any:
        sent.append(sum(each for rank, each in enumerate(sizes) if rank != group.rank))
        received.zero_()
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(exchange.dist, "all_to_all_single", all_to_all)
    totals = tuple(sum(lengths) // ranks + (r < sum(lengths) % ranks) for r in range(ranks))
    most = 0
    for rank, own in enumerate(totals):
        sent.clear()
        group: Any = SimpleNamespace(rank=rank, size=ranks, process_group=None, is_within_host=True)
        assert Exchange(group, totals).own == own
        q, k, v = (torch.zeros(own, n, 8) for n in (heads[0], heads[1], heads[1]))
        ulysses.attend_by_heads(q, k, v, totals, group, lambda q, k, v: q)
        most = max(most, sum(sent))
    assert most == 8 * sent_by_ulysses(sum(lengths), *heads, ranks)


@pytest.mark.parametrize(("lengths", "ranks", "heads"), CASES)
def test_the_ring_sends_as_much_as_is_counted(
    lengths: list[int], ranks: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def isend_irecv(operations: list[Any]) -> list[Any]:
        sent.extend(x.numel() for way, x in operations if way is ring.dist.isend)
        return []

    monkeypatch.setattr(ring.dist, "P2POp", lambda way, x, *_: (way, x))
    monkeypatch.setattr(ring.dist, "batch_isend_irecv", isend_irecv)
    monkeypatch.setattr(
        Block, "attend", lambda self, q, k, v: (q.clone(), q.new_zeros(q.shape[1], q.shape[0]))
    )
    split = split_balanced(lengths, ranks)
    options = Options(True, 1.0, False, "auto", False)
    most = 0
    for rank, own in enumerate(split.totals):
        sent.clear()
        group: Any = SimpleNamespace(
            rank=rank, size=ranks, process_group=None, neighbour=lambda step: 0
        )
        plan = RingPlan.of(split, rank, options, torch.device("cpu"))
        q, k, v = (torch.zeros(own, n, 8) for n in (heads[0], heads[1], heads[1]))
        ring.attend_in_ring(q, k, v, plan, group)
        most = max(most, sum(sent))
    assert most == 8 * sent_by_ring(split, heads[1])


def test_kernels_for_the_ring_are_asked_for_in_the_dtype_of_attention() -> None:
    model = torch.nn.Linear(2, 2)
    embeds = torch.ones(1, 1, 2, dtype=torch.float16)
    assert sharding._dtype(model, {"input_ids": None}) == torch.float32
    assert sharding._dtype(model, {"inputs_embeds": embeds}) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert sharding._dtype(model, {"inputs_embeds": embeds}) == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "dtype", "want"),
    [
        ("auto", torch.float32, True),
        ("sdpa", torch.float64, True),
        # On the CPU torch's operator takes no float16.
        ("auto", torch.float16, False),
        ("reference", torch.float32, False),
        # Needs CUDA.
        ("fa2", torch.bfloat16, False),
    ],
)
def test_whether_a_kernel_serves_the_ring(backend: str, dtype: torch.dtype, want: bool) -> None:
    request = AttentionRequest(torch.device("cpu"), dtype, 16, 4, 2, causal=True, needs_grad=True)
    assert serves_ring(request, backend, 8) is want
