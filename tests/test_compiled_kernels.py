"""Compiled attention by kernels whose own backward is called with what their forward left behind.

The stand-ins assert that the backward gets the out, lse and boundaries of the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import padless.dispatch
from attention_cases import CASES, Case
from compiled_cases import assert_compiled_is_eager, attend_with_gradients, compile_attention
from kernel_stand_ins import forget, install
from padless import compiled
from padless.backends import fa4, torch_varlen
from padless.layout import VarlenLayout

pytestmark = pytest.mark.skipif(
    not compiled.SUPPORTED, reason="needs torch.library.custom_op (torch 2.4)"
)

WITH_LSE = ("fa4", "aten")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", WITH_LSE)
@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim % 8 == 0], ids=str)
def test_the_kernels_own_backward_gives_the_same_numbers(
    case: Case, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = install(monkeypatch, kernel)
    is_open = case.window_size[0] is not None and case.window_size[1] is None and not case.causal
    if sum(case.seqlens_q) and sum(case.keys) and not (is_open and kernel == "aten"):
        assert_compiled_is_eager(case, backend, torch.bfloat16)
    monkeypatch.undo()
    forget()


def count(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> list[str]:
    """Records the calls of an adapter's functions, with the head_dim of what they are given."""
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            calls.append(f"{name} {tensors[0].shape[-1]}")
            return real(*tensors, **options)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("kernel, module", [("fa4", fa4), ("aten", torch_varlen)])
def test_the_forward_is_computed_once_where_the_kernel_allows(
    kernel: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = install(monkeypatch, kernel)
    calls = count(monkeypatch, module, "varlen", "varlen_with_lse", "gradients")
    case = Case("once", (3, 2), num_heads=4, head_dim=16)
    attend_with_gradients(case, backend, torch.bfloat16, compile_attention(backend))
    assert calls == ["varlen_with_lse 16", "gradients 16"]
    # A batch in pieces has one lse for each.
    calls.clear()
    monkeypatch.setattr(module, "reject_layout", _two_at_most)
    pieces = Case("pieces", (3, 2, 4), num_heads=4, head_dim=16)
    attend_with_gradients(pieces, backend, torch.bfloat16, compile_attention(backend))
    assert calls == ["varlen 16"] * 4
    monkeypatch.undo()
    forget()


def _two_at_most(request: Any, layout_q: VarlenLayout, layout_k: VarlenLayout) -> str | None:
    return "takes two sequences" if len(layout_q.lengths) > 2 else None


@pytest.mark.parametrize("kernel", WITH_LSE)
def test_padded_heads_go_back_through_the_kernel_too(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = install(monkeypatch, kernel)
    module = {"fa4": fa4, "aten": torch_varlen}[kernel]
    calls = count(monkeypatch, module, "varlen_with_lse", "gradients")
    plan = padless.dispatch.plan_call

    def padded(*arguments: Any) -> padless.dispatch.Plan:
        found = plan(*arguments)
        return replace(found, head_dim=32)

    monkeypatch.setattr(padless.dispatch, "plan_call", padded)
    case = Case("padded", (3, 5), num_heads=4, head_dim=16)
    assert_compiled_is_eager(case, backend, torch.bfloat16)
    # At 16 the kernel may be wrong, backward as well.
    assert calls == ["varlen_with_lse 32", "gradients 32"]
    monkeypatch.undo()
    forget()
