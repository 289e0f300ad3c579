"""What the tests of qualification share: families of requests, and where questions come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from planted_backends import gradient_with

CPU = torch.device("cpu")
TRAINING = AttentionRequest(
    CPU, torch.bfloat16, head_dim=64, num_heads=6, num_kv_heads=2, causal=True, needs_grad=True
)
FLOAT32 = replace(TRAINING, dtype=torch.float32)
HALF_AND_FLOAT = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


def only_file(cache: Path) -> Path:
    """The one file in the cache."""
    (path,) = cache.iterdir()
    return path


def inside_backward(act: Callable[[], None]) -> None:
    """Acts in the thread of autograd, in the middle of a backward pass."""
    x = torch.ones(2, requires_grad=True)

    def spoil(grad: Tensor) -> Tensor:
        act()
        return grad

    gradient_with(x, spoil).sum().backward()
