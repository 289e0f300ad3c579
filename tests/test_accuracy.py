"""The tests' own measuring sticks: what they let pass, and what they say when they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accuracy import assert_mask_exact, assert_within_budget, expected_visible, visible_keys

TRUTH = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)


def off(*errors: float) -> Tensor:
    """The truth with an error in each number."""
    return TRUTH.float() + torch.tensor(errors).reshape(2, 2)


def test_errors_up_to_the_budget_pass() -> None:
    assert_within_budget("out", off(0.2, 0, 0, 0), off(0.1, 0, 0, 0), TRUTH, max_factor=2)
    assert_within_budget("out", off(0, 0, 0, 0), off(0, 0, 0, 0), TRUTH, max_factor=2)


def test_a_failure_names_error_budget_ratio_and_place() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_within_budget("dq", off(0, 0, 0.8, 0), off(0.2, 0, 0, 0), TRUTH, max_factor=2)
    assert str(caught.value).startswith(
        "dq: RMS error 0.4 is over its budget 0.2 (ratio 2.00), worst at (1, 0): got 3.8, truth 3"
    )


def test_one_large_error_among_many_small_ones_is_over_the_max_budget() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    baseline = torch.full((1000,), 0.1)
    got = torch.zeros(1000)
    got[7] = 0.4
    with pytest.raises(AssertionError, match=r"out: max error 0\.4 .* worst at \(7,\)"):
        assert_within_budget("out", got, baseline, truth, max_factor=3)


@pytest.mark.parametrize(
    "got, message",
    [
        (off(float("nan"), 0, 0, 0), "out: 1 numbers are not finite"),
        (off(0, float("inf"), 0, 0), "out: 1 numbers are not finite"),
        (TRUTH.bfloat16(), r"out: dtype torch\.bfloat16, expected torch\.float32"),
        (off(0, 0, 0, 0).flatten(), r"out: shape \(4,\), expected \(2, 2\)"),
    ],
    ids=["nan", "inf", "dtype", "shape"],
)
def test_what_cannot_be_compared_fails(got: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within_budget("out", got, off(9, 9, 9, 9), TRUTH, max_factor=2)


def test_truth_must_be_float64() -> None:
    right = off(0, 0, 0, 0)
    with pytest.raises(AssertionError, match=r"truth must be float64, got torch\.float32"):
        assert_within_budget("out", right, right, TRUTH.float(), max_factor=2)


def test_expected_mask_is_aligned_at_the_last_key() -> None:
    assert expected_visible(2, 4, causal=True).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert expected_visible(3, 1, causal=True).int().tolist() == [[0], [0], [1]]
    assert expected_visible(1, 2, causal=False).all()
    assert expected_visible(0, 2, causal=True).shape == (0, 2)
    for i, row in enumerate(expected_visible(5, 7, causal=True).tolist()):
        assert row == [j <= i + 7 - 5 for j in range(7)]


def one_key_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A wrong attention: every query sees the third key, and heads their own KV head."""
    return v[2].repeat_interleave(q.shape[1] // v.shape[1], dim=0).expand_as(q)


def test_mask_probe_reads_keys_and_kv_heads_off_a_function() -> None:
    # Five keys and a head_dim of 2: three calls a KV head, the last one not full.
    seen = visible_keys(
        one_key_for_all, [2], [5], num_heads=4, num_kv_heads=2, head_dim=2, dtype=torch.float32
    )
    assert seen.shape == (2, 4, 2, 5)
    assert seen.nonzero()[:, 1:].unique(dim=0).tolist() == [
        [0, 0, 2],
        [1, 0, 2],
        [2, 1, 2],
        [3, 1, 2],
    ]


def test_mask_failure_names_the_first_wrong_pair() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_mask_exact(
            one_key_for_all,
            [2],
            [5],
            causal=False,
            num_heads=4,
            num_kv_heads=2,
            head_dim=2,
            dtype=torch.float32,
        )
    assert str(caught.value) == (
        "32 of 80 mask entries are wrong, the first at (query, head, KV head, key) (0, 0, 0, 0): "
        "expected True"
    )
