"""What `varlen_attention` refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from padless.attention import varlen_attention
from padless.errors import BackendUnavailableError, PadlessError
from padless.layout import VarlenLayout
from padless.selection import BACKENDS


def packed(
    total: int = 5, heads: int = 4, head_dim: int = 8, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A packed tensor of the right number of dimensions."""
    return torch.zeros(total, heads, head_dim, dtype=dtype)


LAYOUT = VarlenLayout.from_lengths([2, 3])
GOOD: dict[str, Any] = {"q": packed(), "k": packed(heads=2), "v": packed(heads=2), "layout": LAYOUT}
HALF = packed(heads=2, dtype=torch.bfloat16)

# Each rule broken once, and those about a tensor for a different tensor each time.
REFUSED = {
    "layout_is_a_tensor": (
        {"layout": LAYOUT.cu_seqlens},
        TypeError,
        "layout must be a VarlenLayout, got Tensor; build one with VarlenLayout.from_mask or "
        ".from_cu_seqlens",
    ),
    "layout_k_is_a_list": (
        {"layout_k": [0, 2, 5]},
        TypeError,
        "layout_k must be a VarlenLayout, got list; build one with VarlenLayout.from_mask or "
        ".from_cu_seqlens",
    ),
    "q_is_dense": (
        {"q": torch.zeros(1, 5, 4, 8)},
        ValueError,
        "q must have shape (total, num_heads, head_dim), got (1, 5, 4, 8)",
    ),
    "v_is_flat": (
        {"v": torch.zeros(5, 16)},
        ValueError,
        "v must have shape (total, num_heads, head_dim), got (5, 16)",
    ),
    "q_is_integer": (
        {"q": packed(dtype=torch.int64)},
        TypeError,
        "q must be floating, got torch.int64",
    ),
    "k_has_another_dtype": (
        {"k": HALF},
        TypeError,
        "k must have q's dtype torch.float32, got torch.bfloat16",
    ),
    "v_is_elsewhere": (
        {"v": packed(heads=2).to("meta")},
        ValueError,
        "v must be on q's device cpu, got meta",
    ),
    "k_has_another_head_dim": (
        {"k": packed(heads=2, head_dim=16)},
        ValueError,
        "k must have q's head_dim 8, got 16",
    ),
    "v_has_other_heads": (
        {"v": packed(heads=4)},
        ValueError,
        "v must have k's shape (5, 2, 8), got (5, 4, 8)",
    ),
    "heads_are_no_multiple": (
        {"k": packed(heads=3), "v": packed(heads=3)},
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 4 and 3",
    ),
    "no_kv_head": (
        {"k": packed(heads=0), "v": packed(heads=0)},
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 4 and 0",
    ),
    "q_has_a_token_too_many": (
        {"q": packed(total=6)},
        ValueError,
        "q must hold the 5 tokens of its layout, got 6",
    ),
    "k_does_not_fit_layout_k": (
        {"layout_k": VarlenLayout.from_lengths([2, 4])},
        ValueError,
        "k must hold the 6 tokens of its layout, got 5",
    ),
    "layout_is_elsewhere": (
        {"layout": VarlenLayout.from_lengths([2, 3], device="meta")},
        ValueError,
        "cu_seqlens must be on q's device cpu, got meta",
    ),
    "layouts_hold_different_numbers": (
        {"layout_k": VarlenLayout.from_lengths([2, 2, 1])},
        ValueError,
        "layout and layout_k must hold the same number of sequences, got 2 and 3",
    ),
    "backend_is_unknown": (
        {"backend": "cudnn"},
        ValueError,
        f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got 'cudnn'",
    ),
    **{
        f"window_is_{name}": (
            {"window_size": window},
            ValueError,
            "window_size must be (left, right), each an integer of at least 0 or None for no "
            f"bound, got {window!r}",
        )
        for name, window in {
            "spelled_otherwise": (-1, 0),
            "a_number": 4,
            "too_short": (4,),
            "too_long": (4, 0, 0),
            "a_fraction": (None, 0.5),
            "a_flag": (True, None),
            "nothing": None,
        }.items()
    },
}


@pytest.mark.parametrize("changes, error, message", REFUSED.values(), ids=REFUSED)
def test_call_is_refused_when(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        varlen_attention(**{**GOOD, **changes})
    assert str(caught.value) == message


def test_good_call_is_not_refused() -> None:
    assert varlen_attention(**GOOD).shape == (5, 4, 8)


def test_named_backend_that_cannot_serve_raises_and_nothing_steps_in() -> None:
    with pytest.raises(
        BackendUnavailableError, match="torch_varlen: needs CUDA, got cpu"
    ) as caught:
        varlen_attention(**GOOD, backend="torch_varlen")
    assert isinstance(caught.value, PadlessError)
    assert isinstance(caught.value, RuntimeError)
