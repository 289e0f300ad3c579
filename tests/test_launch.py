"""A GPU is made the current one for a launch only where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from padless.kernels.launch import on_device


@pytest.mark.parametrize(
    "device, entered", [("cpu", []), ("cuda:1", []), ("cuda:0", ["cuda:0"]), ("cuda:2", ["cuda:2"])]
)
def test_only_another_gpu_is_entered(
    device: str, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        log.append(str(device))
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", enter)
    with on_device(torch.device(device)):
        assert log == entered
