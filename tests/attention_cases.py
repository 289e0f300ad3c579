"""One attention problem as data, and the check of its numbers: for every backend and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accuracy import (
    Window,
    assert_mask_exact,
    assert_within_budget,
    draw,
    eager_baseline,
    expected_visible,
)
from padless.attention import varlen_attention
from padless.layout import VarlenLayout
from padless.reference import reference_attention

OneSequence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call.

    Attributes:
        name: the test's id.
        seqlens_q: queries of each sequence.
        seqlens_k: keys of each sequence; None for as many as queries.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of one head.
        causal: bottom-right aligned, or every key visible.
        softmax_scale: None for the default.
        window_size: keys visible to the left and to the right; None for all.
    """

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...] | None = None
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    causal: bool = True
    softmax_scale: float | None = None
    window_size: Window = (None, None)

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return self.seqlens_q if self.seqlens_k is None else self.seqlens_k

    @property
    def scale(self) -> float:
        """The factor of the scores that the definition uses."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def visible(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """Writes out which keys each query of one sequence sees."""
        return expected_visible(
            seqlen_q, seqlen_k, causal=self.causal, window_size=self.window_size
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        backend: str,
        softmax_scale: float | None = None,
        deterministic: bool | None = None,
    ) -> Tensor:
        """Calls `varlen_attention` as a user would."""
        layout_k = None
        if self.seqlens_k is not None:
            layout_k = VarlenLayout.from_lengths(self.seqlens_k, device=q.device)
        return varlen_attention(
            q,
            k,
            v,
            VarlenLayout.from_lengths(self.seqlens_q, device=q.device),
            layout_k=layout_k,
            causal=self.causal,
            softmax_scale=self.softmax_scale if softmax_scale is None else softmax_scale,
            window_size=self.window_size,
            deterministic=deterministic,
            backend=backend,
        )

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Draws q, k and v that make attention far from uniform, and let them take gradients."""
        shape_q = (sum(self.seqlens_q), self.num_heads, self.head_dim)
        shape_k = (sum(self.keys), self.num_kv_heads, self.head_dim)
        q = 2 * draw(*shape_q, seed=1, dtype=dtype, device=device)
        k = draw(*shape_k, seed=2, dtype=dtype, device=device)
        v = draw(*shape_k, seed=3, dtype=dtype, device=device)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


# Chosen to tell faults apart: three heads a KV head (groups swapped), lengths of 0, 1 and around
# the kernels' tiles of 64 and 128, one length for all or for some (where SDPA is called for several
# at once) and a first one that is only the mean, fewer and more keys than queries, which only
# bottom-right alignment gets right, and a head_dim no kernel likes. Windows of one key, narrower
# and wider than sequences, on both sides, and with other numbers of keys; under causal the right
# side counts for nothing.
CASES = (
    Case("ragged_gqa", (5, 1, 0, 17, 33)),
    Case("ragged_mha", (10, 2, 18), num_heads=4, num_kv_heads=4),
    Case("ragged_mqa", (9, 2, 21), num_heads=4, num_kv_heads=1, head_dim=128),
    Case("seven_heads_a_kv_head", (6, 11), num_heads=14, num_kv_heads=2, head_dim=32),
    Case("tile_edges", (63, 64, 65, 129), num_heads=3, num_kv_heads=1),
    Case("head_dim_96", (7, 12), head_dim=96),
    Case("head_dim_odd", (7, 12), head_dim=33),
    Case("one_token", (1,)),
    Case("one_token_each", (1, 1, 1)),
    Case("equal_lengths", (12, 12, 12)),
    Case("some_equal_lengths", (12, 5, 12, 0, 5, 12)),
    Case("some_equal_keys", (1, 1, 1, 1), (9, 4, 9, 9)),
    Case("equal_lengths_more_keys", (3, 3, 3), (9, 9, 9)),
    Case("equal_lengths_more_queries", (9, 9), (4, 4)),
    Case("more_keys", (1, 4, 7), (16, 5, 20)),
    Case("more_queries", (9, 4, 6, 2), (3, 4, 0, 1)),
    Case("empty_on_either_side", (3, 0, 0, 5), (0, 4, 0, 7)),
    Case("not_causal", (5, 0, 18), causal=False),
    Case("not_causal_other_keys", (5, 3, 8), (2, 9, 0), causal=False),
    Case("scale_given", (6, 11), softmax_scale=0.3),
    Case("window", (5, 1, 0, 17, 33), window_size=(4, None)),
    Case("window_of_one_key", (5, 9), window_size=(0, 7)),
    Case("window_wider_than_all", (5, 9), window_size=(9, None)),
    Case("window_equal_lengths", (12, 12, 12), window_size=(3, None)),
    Case("window_more_keys", (1, 4, 7), (16, 5, 20), window_size=(3, None)),
    Case("window_more_queries", (9, 4, 6, 2), (3, 4, 0, 1), window_size=(2, None)),
    Case("window_both_sides", (5, 0, 18, 8), (5, 3, 18, 2), causal=False, window_size=(3, 2)),
    Case("window_right_only", (5, 12), (9, 4), causal=False, window_size=(None, 3)),
    Case("window_left_only", (5, 12), (9, 4), causal=False, window_size=(3, None)),
    Case("window_tile_edges", (65, 129), window_size=(64, None), num_heads=3, num_kv_heads=1),
)


def by_definition(case: Case, q: Tensor, k: Tensor, v: Tensor, one_sequence: OneSequence) -> Tensor:
    """Runs a function of one sequence over a packed batch, cut by plain counting."""
    pieces, at_q, at_k = [], 0, 0
    for n, m in zip(case.seqlens_q, case.keys, strict=True):
        visible = case.visible(n, m).to(q.device)
        pieces.append(
            one_sequence(q[at_q : at_q + n], k[at_k : at_k + m], v[at_k : at_k + m], visible)
        )
        at_q, at_k = at_q + n, at_k + m
    return torch.cat(pieces)


def with_gradients(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], dout: Tensor
) -> dict[str, Tensor]:
    """Runs a function of q, k and v forward, and backward from dout."""
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_numbers_right(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that out, dq, dk and dv are as near to float64 as eager maths in the dtype is."""
    inputs = case.inputs(dtype, device)
    dout = draw(*inputs[0].shape, seed=4, dtype=dtype, device=device)

    def in_float64(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return reference_attention(
            q[None], k[None], v[None], visible=visible, softmax_scale=case.scale
        )[0]

    def in_dtype(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return eager_baseline(q, k, v, visible, case.scale)

    promoted = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(lambda q, k, v: by_definition(case, q, k, v, in_float64), promoted, dout)
    eager = with_gradients(lambda q, k, v: by_definition(case, q, k, v, in_dtype), inputs, dout)
    got = with_gradients(lambda q, k, v: case.attend(q, k, v, backend=backend), inputs, dout)
    for name, tensor in got.items():
        label = f"{name} of {backend} in {dtype} for {case}"
        if dtype == torch.float32:
            # Fused kernels sum in another order, on CUDA of three TF32 products: eager maths is no
            # measure of that, and an absolute bound can be far below any fault.
            near = 2e-5 if device == "cpu" else 1e-4
            torch.testing.assert_close(
                tensor.double(),
                truth[name],
                rtol=near,
                atol=near,
                msg=lambda m, n=label: f"{n}: {m}",
            )
            continue
        assert_within_budget(
            label, tensor, eager[name], truth[name], max_factor=2 if name == "out" else 3
        )


def assert_mask_right(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts with the mask probe that exactly the right keys reach each query."""
    assert_mask_exact(
        lambda q, k, v: case.attend(q, k, v, backend=backend),
        case.seqlens_q,
        case.keys,
        causal=case.causal,
        window_size=case.window_size,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        device=device,
    )
