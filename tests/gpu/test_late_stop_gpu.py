"""Whether a `generate` call on a CUDA device is over is read a token late: no result tells."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from generation_gpu_cases import EAGER_STEPS, LENGTHS, build_model, generate

import padless

pytestmark = pytest.mark.gpu

MOST = 48


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}], ids=str)
def test_a_step_too_many_is_undone(options: dict[str, Any]) -> None:
    model = build_model()
    plain = generate(model, new=MOST, **options)[:, max(LENGTHS) :].tolist()
    # All rows end, and before the most.
    ends = [row[number] for row, number in zip(plain, (20, 9, 30, 14), strict=True)]
    want = generate(model, new=MOST, eos_token_id=ends, **options)
    drawn = torch.rand(4, device="cuda")
    assert want.shape[1] < max(LENGTHS) + MOST
    with padless.patch(model) as handle:
        got = generate(model, new=MOST, eos_token_id=ends, **options)
        assert torch.equal(torch.rand(4, device="cuda"), drawn)
        report = handle.report()
    assert torch.equal(got, want)
    steps = want.shape[1] - max(LENGTHS) - 1
    assert report.decoding_steps == steps + 1
    assert report.graph_replays == steps + 1 - EAGER_STEPS


def _waits(model: Any, new: int) -> int:
    """Counts the operations of a call that wait for the device."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(model, new=new)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def test_no_step_waits_for_the_device() -> None:
    """Only an event is waited for, which the debug mode does not count."""
    model = build_model()
    stock = _waits(model, 40) - _waits(model, 12)
    assert stock >= 28, "the test would see one wait a step"
    with padless.patch(model):
        generate(model, new=12)
        assert _waits(model, 40) == _waits(model, 12)
