"""What `VarlenLayout` refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from padless.layout import VarlenLayout

IDS = torch.int64


# Each rule of each way in, broken once.
@pytest.mark.parametrize(
    "build, error, message",
    [
        (
            lambda: VarlenLayout.from_mask(torch.ones(2, 3)),
            TypeError,
            "key_padding_mask must be a bool or integer tensor, got torch.float32",
        ),
        (
            lambda: VarlenLayout.from_mask(torch.ones(2, 3, dtype=torch.complex64)),
            TypeError,
            "key_padding_mask must be a bool or integer tensor, got torch.complex64",
        ),
        (
            lambda: VarlenLayout.from_mask([[1, 0]]),  # type: ignore[arg-type]
            TypeError,
            "key_padding_mask must be a bool or integer tensor, got list",
        ),
        (
            lambda: VarlenLayout.from_mask(torch.ones(2, 1, 1, 3, dtype=IDS)),
            ValueError,
            "key_padding_mask must have shape (batch, seqlen), got (2, 1, 1, 3)",
        ),
        (
            lambda: VarlenLayout.from_lengths([3, -1]),
            ValueError,
            "lengths must not be negative, got [3, -1]",
        ),
        (
            lambda: VarlenLayout.from_lengths([2.5, 1]),  # type: ignore[list-item]
            TypeError,
            "lengths must be integers, got [2.5, 1]",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens(torch.tensor([0.0, 2.0])),
            TypeError,
            "cu_seqlens must be an int32 or int64 tensor, got torch.float32",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens([0, 2]),  # type: ignore[arg-type]
            TypeError,
            "cu_seqlens must be an int32 or int64 tensor, got list",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens(torch.zeros(1, 3, dtype=IDS)),
            ValueError,
            "cu_seqlens must have shape (num_sequences + 1,), got (1, 3)",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens(torch.zeros(0, dtype=IDS)),
            ValueError,
            "cu_seqlens must have shape (num_sequences + 1,), got (0,)",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens(torch.tensor([1, 2])),
            ValueError,
            "cu_seqlens must start at 0, got 1",
        ),
        (
            lambda: VarlenLayout.from_cu_seqlens(torch.tensor([0, 2, 5, 4])),
            ValueError,
            "cu_seqlens must not decrease, got 5 then 4 at index 3",
        ),
        (
            lambda: VarlenLayout.from_position_ids(torch.zeros(1, 3)),
            TypeError,
            "position_ids must be an integer tensor, got torch.float32",
        ),
        (
            lambda: VarlenLayout.from_position_ids(torch.ones(1, 3, dtype=torch.bool)),
            TypeError,
            "position_ids must be an integer tensor, got torch.bool",
        ),
        (
            lambda: VarlenLayout.from_position_ids(None),  # type: ignore[arg-type]
            TypeError,
            "position_ids must be an integer tensor, got NoneType",
        ),
        (
            lambda: VarlenLayout.from_position_ids(torch.zeros(3, 1, 4, dtype=IDS)),
            ValueError,
            "position_ids must have shape (batch, seqlen) or (seqlen,), got (3, 1, 4)",
        ),
        (
            lambda: VarlenLayout.from_rows(2, 3).unpad(torch.ones(3, 2, 4)),
            ValueError,
            "padded must begin with shape (2, 3), got (3, 2, 4)",
        ),
        (
            lambda: VarlenLayout.from_rows(2, 3).pad(torch.ones(5, 4)),
            ValueError,
            "packed must hold 6 tokens, got 5",
        ),
    ],
    ids=lambda value: value.split(",")[0].replace(" ", "_") if isinstance(value, str) else "",
)
def test_layout_refuses_what_does_not_fit(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


def test_more_tokens_than_int32_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 tokens .* got 2147483648; split"):
        VarlenLayout.from_lengths([2**30, 2**30])
