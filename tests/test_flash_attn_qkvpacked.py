"""An installed flash-attn of each kind: stand-ins that compute the truth by its contract."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import expected_visible
from attention_cases import Case
from padless.backends import flash_attn_qkvpacked
from padless.backends.flash_attn_qkvpacked import find_kernel, qkvpacked_attention
from padless.layout import VarlenLayout
from padless.reference import reference_attention

MODULE = "flash_attn.flash_attn_interface"
V1 = "flash_attn_unpadded_qkvpacked_func"
V2 = "flash_attn_varlen_qkvpacked_func"
HALF_TYPES = (torch.float16, torch.bfloat16)
Kernel = Callable[..., Tensor]


class StandIn:
    """Both versions' packed kernels, with the arguments and refusals of the real ones."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> None:
        self.dtypes = dtypes
        self.calls: list[str] = []

    def v1(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        self.calls.append("v1")
        assert return_attn_probs is False
        return self._compute(qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal)

    def v2(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        self.calls.append("v2")
        assert (window_size, alibi_slopes) == ((-1, -1), None)
        assert return_attn_probs is False
        return self._compute(qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal)

    def _compute(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
    ) -> Tensor:
        if qkv.dtype not in self.dtypes:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type\nsecond line")
        assert qkv.dim() == 4
        assert qkv.shape[1] == 3
        assert qkv.stride(-1) == 1
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        bounds = cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(qkv))
        assert type(max_seqlen) is int
        assert max_seqlen >= max(b - a for a, b in pairwise(bounds))
        assert dropout_p == 0.0
        pieces = []
        for a, b in pairwise(bounds):
            q, k, v = qkv[None, a:b].double().unbind(2)
            visible = expected_visible(b - a, b - a, causal=causal)
            pieces.append(
                reference_attention(q, k, v, visible=visible, softmax_scale=softmax_scale)[0]
            )
        return torch.cat(pieces).to(qkv.dtype)


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # None makes the import fail as if the package were missing, also where it is installed.
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    """Clears what the adapter remembers of the packages it met."""
    flash_attn_qkvpacked._import_once.cache_clear()
    flash_attn_qkvpacked._refused.clear()


def install(monkeypatch: pytest.MonkeyPatch, **kernels: Kernel) -> None:
    """Puts a module with these functions where flash-attn keeps its interface."""
    module = ModuleType(MODULE)
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, MODULE, module)


def install_broken(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> Path:
    """Puts a package on the path whose interface runs this body on import, and counts the runs."""
    package = folder / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    runs = folder / "runs"
    (package / "flash_attn_interface.py").write_text(
        f"with open({str(runs)!r}, 'a') as f:\n    f.write('x')\n{body}\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    return runs


def packed(dtype: torch.dtype = torch.bfloat16, lengths: tuple[int, ...] = (3, 0, 5, 1)) -> Tensor:
    """Draws qkv `(total, 3, num_heads, head_dim)`."""
    case = Case("packed", lengths, num_heads=4, num_kv_heads=4, head_dim=16)
    return torch.stack([x.detach() for x in case.inputs(dtype)], dim=1)


LAYOUT = VarlenLayout.from_lengths([3, 0, 5, 1])


def attend(qkv: Tensor, layout: VarlenLayout = LAYOUT, *, causal: bool = True) -> Any:
    """Calls the adapter with a scale that is not the default."""
    return qkvpacked_attention(qkv, layout, causal=causal, softmax_scale=0.3)


# v1 alone, v2 alone, and both: the original asks for v1's name first.
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
@pytest.mark.parametrize(
    "names, backend, called",
    [((V1,), "fa1", "v1"), ((V2,), "fa2", "v2"), ((V2, V1), "fa1", "v1")],
    ids=["v1", "v2", "both"],
)
def test_installed_kernel_serves_by_its_contract(
    names: tuple[str, ...],
    backend: str,
    called: str,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = StandIn()
    every = {V1: kernel.v1, V2: kernel.v2}
    install(monkeypatch, **{name: every[name] for name in names})
    assert find_kernel()[0] == backend
    assert find_kernel()[2] == ""
    qkv = packed().requires_grad_()
    name, out = attend(qkv, causal=causal)
    assert (name, kernel.calls) == (backend, [called])
    case = Case("same", (3, 0, 5, 1), num_heads=4, causal=causal, softmax_scale=0.3)
    expected = case.attend(*qkv.double().unbind(1), backend="reference")
    assert torch.equal(out, expected.to(torch.bfloat16))
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.any()


def test_without_the_package_there_is_no_kernel_and_a_reason() -> None:
    name, kernel, reason = find_kernel()
    assert (name, kernel) == ("", None)
    assert reason.startswith(f"import {MODULE} failed: ModuleNotFoundError: ")
    assert attend(packed()) is None


def test_a_package_without_the_functions_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn_func=StandIn().v2)
    assert find_kernel() == ("", None, f"flash_attn has none of {V1}, {V2}")
    assert attend(packed()) is None


@pytest.mark.parametrize("error", ["OSError", "ImportError"])
def test_a_package_built_for_another_torch_is_imported_once_and_is_no_kernel(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = install_broken(monkeypatch, tmp_path, f"raise {error}('undefined symbol: _ZN3c10')")
    assert attend(packed()) is None
    assert attend(packed()) is None
    reason = f"import {MODULE} failed: {error}: undefined symbol: _ZN3c10"
    assert find_kernel() == ("", None, reason)
    assert runs.read_text() == "x"


def test_a_refused_dtype_is_logged_once_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = StandIn()
    install(monkeypatch, **{V2: kernel.v2})
    with caplog.at_level(logging.WARNING, logger="padless"):
        assert attend(packed(torch.float32)) is None
        assert attend(packed(torch.float32)) is None
    assert kernel.calls == ["v2"]
    assert caplog.messages == [
        "the installed flash-attn refuses torch.float32 on cpu with head_dim 16 "
        "(FlashAttention only support fp16 and bf16 data type); "
        "padless uses its own backends instead"
    ]
    # Another dtype is another question.
    assert attend(packed(torch.float16))[0] == "fa2"
    assert kernel.calls == ["v2", "v2"]


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, TypeError, ValueError])
def test_every_way_to_refuse_falls_back(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise error

    install(monkeypatch, **{V1: refuse})
    with caplog.at_level(logging.WARNING, logger="padless"):
        assert attend(packed()) is None
    assert f"({error.__name__})" in caplog.text


def test_out_of_memory_is_the_callers_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    full = StandIn()

    def out_of_memory(*arguments: Any, **options: Any) -> Tensor:
        if not full.calls:
            full.calls.append("full")
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return full.v2(*arguments, **options)

    install(monkeypatch, **{V2: out_of_memory})
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        attend(packed())
    assert attend(packed())[0] == "fa2"


def test_broken_device_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    install(monkeypatch, **{V2: broken})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attend(packed())


def test_no_token_at_all_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = StandIn()
    install(monkeypatch, **{V2: kernel.v2})
    assert attend(packed(lengths=(0, 0)), VarlenLayout.from_lengths([0, 0])) is None
    assert kernel.calls == []
