"""The ring on two GPUs, by copies out of each other's memory and by sending: one GPU's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ring_gpu_jobs import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LENGTHS = {
    "one": [3001],
    "packed": [700, 41, 1500, 1, 333, 90],
    # Copies of some ms, which a missing wait would let attention overtake.
    "long": [32768],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_numbers_are_those_of_one_gpu(lengths: list[int], tmp_path: Path) -> None:
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(compare, (2, str(tmp_path / "store"), lengths, answers), nprocs=2)
    for _ in range(2):
        rank, is_copied, copied, sent = answers.get()
        assert is_copied, f"rank {rank} sends by NCCL"
        for error, other in zip(copied, sent, strict=True):
            assert error <= 1.5 * other + 1e-3, (rank, copied, sent)
            assert error < 1e-2, (rank, copied, sent)
