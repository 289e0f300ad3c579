"""What flash-attn packages are asked, and when they are not: versions, options, broken builds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_stand_ins import fa1_unpadded, fa2_varlen, fa2_varlen_early, fa3_varlen
from kernel_stand_ins import forget
from kernel_stand_ins import install_package as install
from padless.backends import fa1, fa2, fa3, fa4
from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout
from padless.selection import BACKENDS, adapter

FA4 = "flash_attn.cute.interface"
FA3 = "flash_attn_interface"
FA2 = "flash_attn.flash_attn_interface"
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
    for name in ("flash_attn", FA3):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("flash_attn.cute", FA4, FA2):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for module in (fa1, fa2, fa3, fa4):
        monkeypatch.setattr(module, "package_version", lambda name: None)
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    "module, name", [(fa4, FA4), (fa3, FA3), (fa2, FA2), (fa1, FA2)], ids=lambda x: str(x)[:12]
)
def test_without_the_package_the_reason_says_so(module: Any, name: str) -> None:
    reason = module.reject(replace(REQUEST, head_dim=64))
    assert reason is not None
    assert reason.startswith(f"import {name} failed: ModuleNotFoundError: ")
    assert module.version() == "unknown"


@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
def test_a_package_built_for_another_torch_is_imported_once_and_is_a_reason(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    (tmp_path / f"{FA3}.py").write_text(
        f"with open({str(runs)!r}, 'a') as f:\n    f.write('x')\n"
        f"raise {error}('undefined symbol: _ZN3c10')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, FA3)
    reason = f"import {FA3} failed: {error}: undefined symbol: _ZN3c10"
    assert [fa3.reject(REQUEST) for _ in range(2)] == [reason] * 2
    assert runs.read_text() == "x"


def test_nothing_is_imported_for_a_request_that_no_version_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (fa1, fa2, fa3, fa4):
        monkeypatch.setattr(module, "import_optional", lambda name: pytest.fail(name))
        on_cpu = replace(REQUEST, device=torch.device("cpu"))
        assert module.reject(on_cpu) == "needs CUDA, got cpu"


@pytest.mark.parametrize("module, package", [(fa4, FA4), (fa3, FA3)], ids=["fa4", "fa3"])
def test_batches_past_32_bit_offsets_are_refused(
    module: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = VarlenLayout.from_lengths([2**20, 2**20])
    reason = module.reject_layout(REQUEST, layout, layout)
    assert reason is not None
    assert reason.startswith("its offsets reach fewer than 2**31 numbers")
    half = layout.narrow(0, 1)
    assert module.reject_layout(replace(REQUEST, head_dim=64), half, half) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        (WINDOW, None),
        (REPEATS, "does not repeat its gradients"),
        ({**REPEATS, "needs_grad": False}, None),
        ({"head_dim": 264}, "needs head_dim a multiple of 8 up to 256, got 264"),
    ],
)
def test_fa3_is_used_for_what_it_keeps(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FA3, {"flash-attn-3": "3.0.0"}, flash_attn_varlen_func=fa3_varlen)
    assert fa3.reject(replace(REQUEST, **changes)) == reason
    assert fa3.version() == "3.0.0"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_fa3_serves_hopper_only(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FA3, {}, flash_attn_varlen_func=fa3_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert fa3.reject(REQUEST) == f"needs compute capability 9.x, got {capability}"


@pytest.mark.parametrize(
    "version, kernel, changes, reason",
    [
        ("2.8.3", fa2_varlen, {}, None),
        ("2.8.3", fa2_varlen, WINDOW, None),
        ("2.8.3", fa2_varlen, REPEATS, None),
        ("2.1.0", fa2_varlen_early, {}, None),
        (
            "2.1.0",
            fa2_varlen_early,
            WINDOW,
            "flash-attn 2.1.0 takes no window, 2.3 does",
        ),
        (
            "2.1.0",
            fa2_varlen_early,
            REPEATS,
            "flash-attn 2.1.0 does not repeat its gradients, 2.4.1 can",
        ),
        # It aligned causal masks top-left.
        ("2.0.9", fa2_varlen, {}, "needs flash-attn 2.1 or later, got 2.0.9"),
        ("1.0.9", None, {}, "flash-attn 1.0.9 has no flash_attn_varlen_func"),
    ],
)
def test_fa2_is_used_as_far_as_its_version_goes(
    version: str,
    kernel: Any,
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions = {} if kernel is None else {"flash_attn_varlen_func": kernel}
    install(monkeypatch, FA2, {"flash-attn": version}, **functions)
    assert fa2.reject(replace(REQUEST, **changes)) == reason


def test_fa2_backward_of_thousands_of_short_sequences_is_refused() -> None:
    many = VarlenLayout.from_lengths([7] * 20000)
    reason = fa2.reject_layout(REQUEST, many, many)
    assert reason is not None
    assert reason.startswith("the scratch of its backward would pass 2**31 numbers")
    assert fa2.reject_layout(replace(REQUEST, needs_grad=False), many, many) is None


@pytest.mark.parametrize(
    "capability, hip, dtype, serving",
    [
        ((7, 0), None, torch.float16, []),
        ((7, 5), None, torch.float16, []),
        ((7, 5), None, torch.bfloat16, []),
        ((8, 0), None, torch.bfloat16, ["torch_varlen", "fa2"]),
        ((8, 6), None, torch.float16, ["torch_varlen", "fa2"]),
        ((8, 6), None, torch.float32, []),
        ((12, 0), None, torch.bfloat16, ["torch_varlen", "fa2"]),
        # An AMD GPU has numbers of its own there.
        ((9, 4), "6.4", torch.bfloat16, ["torch_varlen", "fa2"]),
    ],
    ids=str,
)
def test_a_gpu_is_served_by_what_it_runs_and_not_by_what_imports(
    capability: tuple[int, int],
    hip: str | None,
    dtype: torch.dtype,
    serving: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FA2, {"flash-attn": "2.8.3"}, flash_attn_varlen_func=fa2_varlen)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    request = replace(REQUEST, dtype=dtype, num_kv_heads=2)
    accepted = [name for name in BACKENDS if adapter(name).reject(request) is None]
    # Everywhere something of torch's own is left.
    assert accepted == [*serving, "sdpa", "reference"]


FP16 = {"dtype": torch.float16, "head_dim": 64}


@pytest.mark.parametrize(
    "capability, changes, reason",
    [
        ((9, 0), {}, None),
        ((9, 0), REPEATS, None),
        ((7, 5), FP16, None),
        ((8, 6), {"head_dim": 128, "needs_grad": False}, None),
        (
            (8, 6),
            {"head_dim": 128},
            "needs head_dim up to 64 for gradients on compute capability (8, 6)",
        ),
        (
            (7, 5),
            {"head_dim": 64},
            "needs float16 on compute capability (7, 5), got torch.bfloat16",
        ),
        (
            (9, 0),
            {"dtype": torch.float32},
            "needs float16 or bfloat16 on compute capability (9, 0), got torch.float32",
        ),
        ((7, 0), FP16, "needs compute capability 7.5, 8.x or 9.0, got (7, 0)"),
        ((10, 0), {}, "needs compute capability 7.5, 8.x or 9.0, got (10, 0)"),
        ((9, 0), {"head_dim": 136}, "needs head_dim a multiple of 8 up to 128, got 136"),
        ((9, 0), {"num_kv_heads": 2}, "needs as many KV heads as heads, got 8 and 2"),
        ((9, 0), WINDOW, "takes no window"),
    ],
)
def test_fa1_serves_what_the_first_version_could(
    capability: tuple[int, int],
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FA2, {"flash-attn": "1.0.9"}, flash_attn_unpadded_func=fa1_unpadded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert fa1.reject(replace(REQUEST, **changes)) == reason


@pytest.mark.parametrize(
    "seqlens_q, seqlens_k, causal, reason",
    [
        ((3, 2), (3, 2), True, None),
        ((3, 2), (5, 4), False, None),
        (
            (3, 2),
            (3, 4),
            True,
            "aligns causal masks top-left: needs as many keys as queries in each sequence",
        ),
        ((3, 0), (3, 0), True, "takes no empty sequence"),
        ((3, 2), (3, 0), False, "takes no empty sequence"),
    ],
)
def test_fa1_serves_lengths_where_its_mask_is_ours(
    seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...], causal: bool, reason: str | None
) -> None:
    layouts = [VarlenLayout.from_lengths(lengths) for lengths in (seqlens_q, seqlens_k)]
    assert fa1.reject_layout(replace(REQUEST, causal=causal), *layouts) == reason
