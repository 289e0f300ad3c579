"""Which backend serves a request and why not the others; CUDA requests are asked without CUDA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from padless.backends import sdpa, torch_varlen
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.selection import BACKENDS, Candidate, Selection, adapter, select_backend

CPU = AttentionRequest("cpu", torch.float32, head_dim=64, num_heads=4, num_kv_heads=2)
CUDA = replace(CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _hopper_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch_varlen, "_kernel", lambda: (lambda: None, frozenset()))


def test_every_backend_has_an_adapter_of_its_name() -> None:
    for name in BACKENDS:
        module = adapter(name)
        assert module.NAME == name
        assert callable(module.reject)
        assert callable(module.varlen)


def test_request_describes_packed_tensors() -> None:
    q, k = torch.zeros(5, 4, 64), torch.zeros(7, 2, 64)
    assert AttentionRequest.of(q, k) == CPU


def test_auto_on_cuda_takes_the_fastest_and_asks_no_further() -> None:
    assert select_backend(CUDA) == Selection("torch_varlen", (Candidate("torch_varlen", None),))


def test_auto_on_the_cpu_takes_sdpa_and_says_why_not_the_faster() -> None:
    assert select_backend(CPU) == Selection(
        "sdpa", (Candidate("torch_varlen", "needs CUDA, got cpu"), Candidate("sdpa", None))
    )


# One change each to a request and a machine that torch_varlen accepts.
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device_type": "cpu"}, "needs CUDA, got cpu"),
        ({"device_type": "mps"}, "needs CUDA, got mps"),
        ({"dtype": torch.float32}, "needs float16 or bfloat16, got torch.float32"),
        ({"dtype": torch.float64}, "needs float16 or bfloat16, got torch.float64"),
        ({"head_dim": 264}, "needs head_dim a multiple of 8 up to 256, got 264"),
        ({"head_dim": 100}, "needs head_dim a multiple of 8 up to 256, got 100"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_torch_varlen_rejects_a_request_with_its_reason(
    changes: dict[str, object], reason: str
) -> None:
    request = replace(CUDA, **changes)
    assert torch_varlen.reject(request) == reason
    chosen = select_backend(request)
    assert chosen.name == "sdpa"
    assert chosen.trace[0] == Candidate("torch_varlen", reason)
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(request, "torch_varlen")
    assert str(caught.value) == f"no backend can serve {request}: torch_varlen: {reason}"


@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_varlen_accepts_half_types_and_every_eighth_head_dim(
    head_dim: int, dtype: torch.dtype
) -> None:
    assert torch_varlen.reject(replace(CUDA, head_dim=head_dim, dtype=dtype)) is None


def test_torch_varlen_rejects_a_gpu_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert torch_varlen.reject(CUDA) == "needs compute capability 8.0, got (7, 5)"
    # AMD counts otherwise: there the number says nothing.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert torch_varlen.reject(CUDA) is None


def test_torch_varlen_rejects_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "_kernel", lambda: (None, frozenset()))
    reason = f"torch {torch.__version__} has no torch.nn.attention.varlen"
    assert torch_varlen.reject(CUDA) == reason


def test_nothing_is_asked_of_cuda_for_a_request_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "get_device_capability")
    assert select_backend(CPU).name == "sdpa"


def test_reference_serves_where_torch_has_no_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "has_sdpa", lambda: False)
    chosen = select_backend(CPU)
    assert chosen.name == "reference"
    assert [candidate.rejected for candidate in chosen.trace] == [
        "needs CUDA, got cpu",
        "torch has no scaled_dot_product_attention (2.0 and later have it)",
        None,
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_is_the_only_one_asked(name: str) -> None:
    chosen = select_backend(CUDA, name)
    assert chosen == Selection(name, (Candidate(name, None),))


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_integers_are_rejected_with_the_reason(name: str) -> None:
    request = replace(CPU, dtype=torch.int64)
    with pytest.raises(BackendUnavailableError, match=r"needs a floating dtype, got torch\.int64"):
        select_backend(request, name)


def test_the_error_lists_every_candidate_when_none_can_serve() -> None:
    request = replace(CPU, dtype=torch.int64)
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(request)
    assert str(caught.value) == (
        f"no backend can serve {request}: torch_varlen: needs CUDA, got cpu; "
        "sdpa: needs a floating dtype, got torch.int64; "
        "reference: needs a floating dtype, got torch.int64"
    )


@pytest.mark.parametrize("name", ["flash", "", "Auto", "request"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        select_backend(CPU, name)
    assert str(caught.value) == (
        f"backend must be 'auto' or one of torch_varlen, sdpa, reference, got {name!r}"
    )
