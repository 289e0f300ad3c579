"""What happens between a call and its backend: padded heads, batches in pieces, the next best."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import padless.dispatch
import padless.workload
from attention_cases import Case, assert_mask_right, assert_numbers_right
from padless.answers import Candidate, Selection
from padless.backends import reference, sdpa
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout


@dataclass
class Fussy(ModuleType):
    """A backend with limits of its own, which records what it is given and computes by SDPA."""

    most_sequences: int | None = None
    most_tokens: int | None = None
    head_dim: int | None = None
    calls: list[tuple[int, ...]] = field(default_factory=list)
    head_dims: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__("fussy")

    def reject_layout(
        self, request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
    ) -> str | None:
        """Refuses batches over its limits."""
        assert request.head_dim == (self.head_dim or request.head_dim)
        if self.most_sequences is not None and len(layout_q.lengths) > self.most_sequences:
            return f"takes {self.most_sequences} sequences"
        if self.most_tokens is not None and layout_q.total > self.most_tokens:
            return f"takes {self.most_tokens} tokens"
        return None

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout_q: VarlenLayout,
        layout_k: VarlenLayout,
        **options: Any,
    ) -> Tensor:
        """Attends, and holds the caller to what was refused."""
        assert self.reject_layout_quietly(layout_q, layout_k) is None
        assert layout_q.total
        assert layout_k.total
        for layout, tensor in ((layout_q, q), (layout_k, k)):
            assert layout.cu_seqlens.tolist() == layout.host_cu_seqlens.tolist()
            assert layout.cu_seqlens[-1] == len(tensor)
        self.calls.append(layout_q.lengths)
        self.head_dims.append(q.shape[-1])
        return sdpa.varlen(q, k, v, layout_q, layout_k, **options)

    def reject_layout_quietly(self, layout_q: VarlenLayout, layout_k: VarlenLayout) -> str | None:
        """Asks again without a request."""
        request = AttentionRequest(
            torch.device("cpu"), torch.float32, self.head_dim or 16, 6, 2, True
        )
        return self.reject_layout(request, layout_q, layout_k)


def serve(
    monkeypatch: pytest.MonkeyPatch, fussy: Fussy, asked: list[dict[str, str]] | None = None
) -> None:
    """Lets `fussy` be the first choice, the reference the second; records what is passed over."""

    def select(
        request: AttentionRequest,
        backend: str = "auto",
        *,
        passing_over: dict[str, str],
        little_work: bool,
    ) -> Selection:
        if asked is not None:
            asked.append(dict(passing_over))
        name = "reference" if "fussy" in passing_over else "fussy"
        head_dim = fussy.head_dim if name == "fussy" and fussy.head_dim else request.head_dim
        return Selection(name, head_dim, (Candidate(name, head_dim, None),))

    adapters = {"fussy": fussy, "reference": reference}
    monkeypatch.setattr(padless.dispatch, "select_backend", select)
    monkeypatch.setattr(padless.dispatch, "adapter", adapters.__getitem__)


SEVEN = Case("seven", (5, 1, 0, 17, 3, 9, 2), head_dim=16)


@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_padded_to_what_the_backend_is_right_for(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fussy = Fussy(head_dim=head_dim)
    serve(monkeypatch, fussy)
    # The scale stays that of the heads that were given.
    assert_numbers_right(SEVEN, "auto", dtype)
    assert_mask_right(Case("mask", (5, 2, 9), head_dim=16), "auto", dtype)
    assert set(fussy.head_dims) == {head_dim}


@pytest.mark.parametrize("most_sequences", [1, 2, 3, 6, 7])
def test_a_batch_of_too_many_sequences_is_served_in_pieces(
    most_sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fussy = Fussy(most_sequences=most_sequences)
    serve(monkeypatch, fussy)
    assert_numbers_right(SEVEN, "auto", torch.float32)
    served = [n for lengths in fussy.calls for n in lengths]
    # A piece without a token is answered without the backend.
    assert [n for n in served if n] == [n for n in SEVEN.seqlens_q if n]
    assert all(len(lengths) <= most_sequences for lengths in fussy.calls)
    if most_sequences == 7:
        assert fussy.calls == [SEVEN.seqlens_q]


def test_pieces_keep_queries_and_keys_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fussy = Fussy(most_sequences=2)
    serve(monkeypatch, fussy)
    case = Case("pieces", (3, 0, 5, 2, 4), (4, 3, 0, 9, 4), head_dim=16)
    assert_numbers_right(case, "auto", torch.float32)
    assert_mask_right(case, "auto", torch.float32)
    # The third sequence has no key, and is answered without the backend.
    assert set(fussy.calls) == {(3, 0), (2, 4)}


def test_auto_takes_the_next_backend_if_a_single_sequence_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, str]] = []
    fussy = Fussy(most_tokens=16)
    serve(monkeypatch, fussy, asked)
    assert_numbers_right(SEVEN, "auto", torch.float32)
    assert fussy.calls == []
    assert asked == [{}, {"fussy": "takes 16 tokens"}]


def test_a_named_backend_that_cannot_take_the_layout_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, str]] = []
    serve(monkeypatch, Fussy(most_tokens=16), asked)
    inputs = SEVEN.inputs(torch.float32)
    with pytest.raises(BackendUnavailableError) as caught:
        SEVEN.attend(*inputs, backend="fussy")
    request = AttentionRequest.of(*inputs)
    assert str(caught.value) == f"no backend can serve {request}: fussy: takes 16 tokens"
    assert asked == [{}]


def test_a_layout_narrowed_is_that_of_the_stretch() -> None:
    layout = VarlenLayout.from_lengths([3, 0, 5, 2])
    part = layout.narrow(1, 3)
    assert (part.lengths, part.total, part.max_seqlen) == ((0, 5), 5, 5)
    assert part.cu_seqlens.tolist() == [0, 0, 5]
    assert part.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8, 10]


def _on_cuda(**fields: Any) -> AttentionRequest:
    known = {
        "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "causal": True, "needs_grad": True
    }  # fmt: skip
    return AttentionRequest(torch.device("cuda", 0), torch.bfloat16, **{**known, **fields})


_LARGE: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
LITTLE: dict[str, tuple[dict[str, Any], list[int], bool]] = {
    "SmolLM2, a small batch": ({}, [60, 80, 70, 65], True),
    "SmolLM2, 8 x 1024": ({}, [1024] * 8, True),
    "SmolLM2, long rows": ({}, [4096] * 4, False),
    "SmolLM2, one long row": ({}, [16384], False),
    "8B, a small batch": (_LARGE, [200] * 3, True),
    "8B, 8 x 256": (_LARGE, [256] * 8, False),
    "8B, 8 x 256, forward alone": ({**_LARGE, "needs_grad": False}, [256] * 8, True),
    "8B, 8 x 512, forward alone": ({**_LARGE, "needs_grad": False}, [512] * 8, False),
    "SmolLM2, 4 x 4096, forward alone": ({"needs_grad": False}, [4096] * 4, False),
    "SmolLM2, 2 x 4096, forward alone": ({"needs_grad": False}, [4096] * 2, True),
    "SmolLM2, 8 x 1024, all keys visible": ({"causal": False}, [1024] * 8, False),
}


@pytest.mark.parametrize("case", LITTLE)
def test_which_calls_the_host_is_what_they_wait_for(case: str) -> None:
    fields, lengths, want = LITTLE[case]
    layout = VarlenLayout.from_lengths(lengths)
    request = _on_cuda(**fields)
    assert padless.dispatch.has_little_work(request, layout, layout) is want
    on_cpu = replace(request, device=torch.device("cpu"))
    assert padless.dispatch.has_little_work(on_cpu, layout, layout) is False
    with padless.workload.as_if_much_work():
        assert padless.dispatch.has_little_work(request, layout, layout) is False
    assert padless.dispatch.has_little_work(request, layout, layout) is want


def test_selection_is_told_of_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def select(request: AttentionRequest, backend: str, **options: Any) -> Selection:
        told.append((backend, options["little_work"]))
        return Selection("sdpa", request.head_dim, (Candidate("sdpa", request.head_dim, None),))

    monkeypatch.setattr(padless.dispatch, "select_backend", select)
    for lengths in ([5, 3], [16384]):
        layout = VarlenLayout.from_lengths(lengths)
        padless.dispatch.plan_call(_on_cuda(), "auto", layout, layout)
    assert told == [("auto", True), ("auto", False)]
