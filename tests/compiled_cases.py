"""What tests of compiled attention share: how they compile, and that it is what eager computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accuracy import draw
from attention_cases import Case
from padless.attention import varlen_attention
from padless.layout import VarlenLayout


def compile_whole(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    """Compiles without leave to break the graph."""
    return torch.compile(function, backend=backend, fullgraph=True)


def compile_attention(backend: str) -> Callable[..., Tensor]:
    """Compiles a bare call, of q, k, v and the layouts."""
    return compile_whole(
        lambda q, k, v, layout, layout_k: varlen_attention(
            q, k, v, layout, layout_k=layout_k, backend=backend
        )
    )


def attend_with_gradients(
    case: Case, backend: str, dtype: torch.dtype, function: Callable[..., Tensor]
) -> list[Tensor]:
    """Runs a case forward and backward by a function of q, k, v and the layouts."""
    inputs = case.inputs(dtype)
    layouts = [VarlenLayout.from_lengths(lengths) for lengths in (case.seqlens_q, case.keys)]
    out = function(*inputs, *layouts)
    dout = draw(*out.shape, seed=4, dtype=dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def assert_compiled_is_eager(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Asserts that a case gives the same numbers compiled and not."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, layout_k: VarlenLayout
    ) -> Tensor:
        return varlen_attention(
            q,
            k,
            v,
            layout,
            layout_k=layout_k,
            causal=case.causal,
            softmax_scale=case.softmax_scale,
            window_size=case.window_size,
            backend=backend,
        )

    eager = attend_with_gradients(case, backend, dtype, attend)
    traced = attend_with_gradients(case, backend, dtype, compile_whole(attend))
    for one, other in zip(traced, eager, strict=True):
        assert torch.equal(one, other)
