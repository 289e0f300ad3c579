"""What a group knows of its place, and what follows for how heads travel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from padless import VarlenLayout
from padless.parallel import group as group_module
from padless.parallel import ulysses
from padless.parallel.group import SequenceGroup
from padless.parallel.ring_plan import Options
from padless.parallel.shard import Shard


@pytest.mark.parametrize(
    "started, ranks, want",
    [
        (None, [0, 1, 8, 9], True),
        ("", [0, 8], True),
        ("8", [0, 1, 2, 3], True),
        ("8", [8, 12, 15], True),
        ("8", [7, 8], False),
        ("2", [0, 1, 2, 3], False),
    ],
)
def test_whether_ranks_are_of_one_host(
    started: str | None, ranks: list[int], want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", started)
    monkeypatch.setattr(group_module.dist, "get_process_group_ranks", lambda group: ranks)
    assert SequenceGroup(object(), 0, len(ranks)).is_within_host is want


@pytest.mark.parametrize(
    "is_within_host, kv_heads, want", [(True, 4, 1), (False, 4, 2), (False, 2, 1)]
)
def test_heads_travel_in_parts_between_hosts(
    is_within_host: bool, kv_heads: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        """Keeps what it is given: of two ranks, both of them this one."""

        def __init__(self, *_: Any) -> None:
            pass

        def to_heads(self, blocks: Tensor) -> Any:
            return SimpleNamespace(wait=lambda: blocks.flatten(0, 1))

        def to_tokens(self, rows: Tensor) -> Any:
            return SimpleNamespace(wait=lambda: rows.unflatten(0, (2, -1)))

    monkeypatch.setattr(ulysses, "Exchange", NoExchange)
    seen: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(k.shape[1])
        return q.clone()

    q, k, v = torch.randn(3, 8, 4), torch.randn(3, kv_heads, 4), torch.randn(3, kv_heads, 4)
    group: Any = SimpleNamespace(size=2, is_within_host=is_within_host)
    out = ulysses.attend_by_heads(q, k, v, (3, 3), group, attend)
    assert seen == [kv_heads // 2 // want] * want
    assert torch.equal(out, q)


@pytest.mark.parametrize(
    "lengths, meets",
    [([64], False), ([16] * 8, False), ([2, 1], True)],
    ids=["all share", "nobody shares", "some share"],
)
def test_ranks_meet_where_some_have_no_part_in_the_ring(
    lengths: list[int], meets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[torch.device] = []
    monkeypatch.setattr(SequenceGroup, "meet", lambda self, device: met.append(device))
    for rank in range(4):
        met.clear()
        shard = Shard.of(
            VarlenLayout.from_lengths(lengths), SequenceGroup(object(), rank, 4), "ring"
        )
        for _ in range(2):
            shard.ring_plan(Options(True, 1.0, False, "auto", True), torch.device("cpu"))
        assert len(met) == meets
