"""What FlashAttention-4 is asked, and when it is not: versions, GPUs, bounds, its own backward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kernel_stand_ins
from accuracy import draw
from attention_cases import Case, assert_numbers_right
from fa4_stand_ins import fa4_varlen
from kernel_stand_ins import forget
from kernel_stand_ins import install_package as install
from padless.backends import fa2, fa4
from padless.backends.request import AttentionRequest

FA4 = "flash_attn.cute.interface"
REQUEST = AttentionRequest(
    torch.device("cuda", 0), torch.bfloat16, 128, 8, 8, causal=True, needs_grad=True
)
WINDOW = {"window_size": (4, None)}
REPEATS = {"deterministic": True}


@pytest.fixture(autouse=True)
def _hopper_without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # None makes the import fail as if the package were missing, also where it is installed.
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for name in ("flash_attn.cute", FA4):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(fa4, "package_version", lambda name: None)
    forget()
    yield
    monkeypatch.undo()
    forget()


# FlashAttention-4 alone leaves `flash_attn` without an `__init__`: no sign of FlashAttention-2.
def test_fa4_alone_is_not_fa2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.0.0'\n")
    (package / "interface.py").write_text(
        "def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None,\n"
        "    max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False): ...\n"
    )
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    assert fa4.reject(REQUEST) is None
    reason = fa2.reject(REQUEST)
    assert reason is not None
    assert reason.startswith("import flash_attn.flash_attn_interface failed: ModuleNotFoundError: ")
    for name in ("flash_attn", "flash_attn.cute", FA4):
        sys.modules.pop(name, None)


def fa4_without(*names: str) -> Any:
    """Makes a kernel of FlashAttention-4 that lacks arguments."""
    every = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
    left = [name for name in (*every, "causal", "window_size") if name not in names]
    scope: dict[str, Any] = {}
    exec(f"def kernel(q, k, v, {', '.join(left)}): ...", scope)
    return scope["kernel"]


@pytest.mark.parametrize(
    "version, kernel, changes, reason",
    [
        ("4.0.0b36", fa4_varlen, {}, None),
        ("4.0.0b36", fa4_varlen, WINDOW, None),
        ("4.0.0b36", fa4_varlen, REPEATS, None),
        ("4.0.0b36", fa4_varlen, {"head_dim": 256}, None),
        (
            "4.0.0b11",
            fa4_varlen,
            REPEATS,
            "flash-attn-4 4.0.0b11 does not repeat its gradients, 4.0.0b12 does",
        ),
        ("4.0.0b11", fa4_varlen, {**REPEATS, "needs_grad": False}, None),
        (
            "4.0.0b36",
            fa4_without("max_seqlen_q"),
            {},
            "flash_attn_varlen_func of flash-attn-4 4.0.0b36 takes no max_seqlen_q",
        ),
        (
            "4.0.0b36",
            fa4_without("window_size"),
            WINDOW,
            "flash-attn-4 4.0.0b36 takes no window",
        ),
        ("4.0.0b36", None, {}, f"{FA4} has no flash_attn_varlen_func"),
        (
            "4.0.0b36",
            fa4_varlen,
            {"head_dim": 100},
            "needs head_dim a multiple of 8 up to 256, got 100",
        ),
    ],
)
def test_fa4_is_used_as_far_as_its_version_goes(
    version: str,
    kernel: Any,
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions = {} if kernel is None else {"flash_attn_varlen_func": kernel}
    install(monkeypatch, FA4, {"flash-attn-4": version}, **functions)
    assert fa4.reject(replace(REQUEST, **changes)) == reason
    assert fa4.version() == version


@pytest.mark.parametrize(
    "capability, head_dim, reason",
    [
        ((8, 0), 128, "needs compute capability 9.x or 10.x, got (8, 0)"),
        ((12, 0), 128, "needs compute capability 9.x or 10.x, got (12, 0)"),
        ((10, 0), 128, None),
        ((10, 3), 256, None),
        ((10, 0), 192, "needs head_dim up to 128, or 256, on Blackwell, got 192"),
        ((9, 0), 192, None),
    ],
)
def test_fa4_serves_hopper_and_blackwell(
    capability: tuple[int, int],
    head_dim: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FA4, {"flash-attn-4": "4.0.0b36"}, flash_attn_varlen_func=fa4_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert fa4.reject(replace(REQUEST, head_dim=head_dim)) == reason


def seen_by_fa4(
    monkeypatch: pytest.MonkeyPatch, case: Case, *, deterministic: bool = False
) -> dict[str, Any]:
    """Calls FlashAttention-4 and gives the options that it saw."""
    seen: dict[str, Any] = {}

    def kernel(*tensors: Any, **options: Any) -> Any:
        seen.update(options)
        return fa4_varlen(*tensors, **options)

    kernel.__wrapped__ = fa4_varlen  # type: ignore[attr-defined]  # its signature
    install(monkeypatch, FA4, {"flash-attn-4": "4.0.0b36"}, flash_attn_varlen_func=kernel)
    monkeypatch.setattr(fa4, "reject_gpu", lambda request, **_: None)
    inputs = case.inputs(torch.bfloat16)
    case.attend(*inputs, backend="fa4", deterministic=deterministic)
    return seen


# One kernel is compiled for lengths below a tile and another above: between them every bound of a
# batch has to look the same to the package, whatever the lengths are.
@pytest.mark.parametrize(
    "lengths, bound",
    [((1, 1), 1), ((1, 2), 512), ((63, 5), 512), ((129,), 512), ((512,), 512), ((513, 9), 513)],
    ids=str,
)
def test_fa4_is_not_compiled_again_for_short_lengths(
    lengths: tuple[int, ...], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_fa4(monkeypatch, Case("bound", lengths, head_dim=16))
    assert (seen["max_seqlen_q"], seen["max_seqlen_k"]) == (bound, bound)


@pytest.mark.parametrize("deterministic", [False, True])
def test_fa4_is_told_whether_gradients_repeat(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("repeats", (3, 2), head_dim=16)
    assert seen_by_fa4(monkeypatch, case, deterministic=deterministic)["deterministic"] == (
        deterministic
    )


def test_fa4_tells_whether_its_backward_can_be_called_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not fa4.saves_lse()
    for name, saves in (("fa4", True), ("fa4_early", False)):
        kernel_stand_ins.install(monkeypatch, name)
        assert fa4.saves_lse() == saves


def test_fa4_is_asked_only_for_what_its_version_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
    ) -> Any:
        boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return fa4_varlen(q, k, v, None, *boundaries, softmax_scale=softmax_scale, causal=causal)

    install(monkeypatch, FA4, {"flash-attn-4": "4.0.0b1"}, flash_attn_varlen_func=kernel)
    monkeypatch.setattr(fa4, "reject_gpu", lambda request, **_: None)
    case = Case("first", (3, 0, 2), head_dim=16)
    assert_numbers_right(case, "fa4", torch.bfloat16)


# 4.0.0 betas index dout with 32 bits: rows of a slice can lie too far apart for that.
def test_fa4_goes_back_from_a_dout_that_is_in_its_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_stand_ins.install(monkeypatch, "fa4")
    case = Case("dout", (3, 2), head_dim=16)
    inputs = case.inputs(torch.bfloat16)
    out = case.attend(*inputs, backend="fa4")
    wide = draw(*out.shape[:2], 17, seed=4, dtype=torch.bfloat16)[..., :16]
    seen: list[bool] = []
    assert out.grad_fn is not None
    out.grad_fn.register_prehook(lambda grads: seen.append(grads[0].is_contiguous()))
    found = torch.autograd.grad(out, inputs, wide)
    assert seen == [True]
    again = case.attend(*inputs, backend="fa4")
    for one, other in zip(
        found, torch.autograd.grad(again, inputs, wide.contiguous()), strict=True
    ):
        assert torch.equal(one, other)
