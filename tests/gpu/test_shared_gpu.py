"""Sequences that two GPUs share: one GPU's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from shared_gpu_jobs import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LENGTHS = {
    "one": [3001],
    "packed": [700, 41, 1500, 1, 333, 90],
    # Exchanges of some ms, which a missing wait would let attention overtake.
    "long": [32768],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_numbers_are_those_of_one_gpu(lengths: list[int], tmp_path: Path) -> None:
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(compare, (2, str(tmp_path / "store"), lengths, answers), nprocs=2)
    for _ in range(2):
        for way, errors in answers.get().items():
            assert max(errors) < 1e-2, (way, errors)
