"""Sequences that several GPUs share: Ulysses and ring attention over a `DeviceMesh`."""

from padless.parallel.attention import (
    gather_row,
    ring_attention,
    shard_tokens,
    ulysses_attention,
)
from padless.parallel.group import SequenceGroup
from padless.parallel.shard import Shard
from padless.parallel.split import Piece, SequenceSplit, split_balanced, split_evenly

__all__ = [
    "Piece",
    "SequenceGroup",
    "SequenceSplit",
    "Shard",
    "gather_row",
    "ring_attention",
    "shard_tokens",
    "split_balanced",
    "split_evenly",
    "ulysses_attention",
]
