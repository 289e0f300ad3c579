"""Lets adapters find stand-ins for kernels that need a GPU, in place of packages and operators."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

import flash_stand_ins
from fa4_stand_ins import fa4_backward, fa4_varlen, fa4_varlen_early
from flash_stand_ins import (
    aten_backward,
    aten_forward,
    fa1_unpadded,
    fa2_varlen,
    fa2_varlen_early,
    fa3_varlen,
    fa3_varlen_early,
)
from padless.backends import fa1, fa2, fa3, fa4, torch_varlen
from padless.selection import forget_selections


def forget() -> None:
    """Clears what the adapters remember of the packages they met."""
    for module in (fa1, fa2, fa3, fa4, torch_varlen):
        for name in ("_package", "_kernel", "_backward", "_operator", "version"):
            getattr(getattr(module, name, None), "cache_clear", lambda: None)()
    forget_selections()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Lets adapters take the CPU for a GPU of this compute capability."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in (fa2, fa3, fa4, torch_varlen):
        monkeypatch.setattr(module, "reject_gpu", lambda request, **_: None)
    monkeypatch.setattr(fa1, "_reject_gpu", lambda request: None)


def install_package(
    monkeypatch: pytest.MonkeyPatch, name: str, versions: dict[str, str], **functions: Any
) -> None:
    """Puts a module with these functions where a package keeps its interface."""
    module = ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    parent = ""
    for part in name.split(".")[:-1]:
        parent = f"{parent}.{part}" if parent else part
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    for adapter in (fa1, fa2, fa3, fa4):
        monkeypatch.setattr(
            adapter,
            "package_version",
            lambda name: Version(versions[name]) if name in versions else None,
        )
    forget()


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Installs a stand-in by its name; gives the name of the backend that finds it."""
    if name.startswith("fa4"):
        early = name == "fa4_early"
        functions = {"flash_attn_varlen_func": fa4_varlen_early if early else fa4_varlen}
        if not early:
            functions["_flash_attn_bwd"] = fa4_backward
        versions = {"flash-attn-4": "4.0.0b5" if early else "4.0.0b36"}
        install_package(monkeypatch, "flash_attn.cute.interface", versions, **functions)
    elif name.startswith("fa3"):
        kernel = fa3_varlen_early if name == "fa3_early" else fa3_varlen
        versions = {"flash-attn-3": "3.0.0"}
        install_package(
            monkeypatch, "flash_attn_interface", versions, flash_attn_varlen_func=kernel
        )
    elif name.startswith("fa2"):
        early = name == "fa2_early"
        install_package(
            monkeypatch,
            "flash_attn.flash_attn_interface",
            {"flash-attn": "2.1.0" if early else "2.8.3"},
            flash_attn_varlen_func=fa2_varlen_early if early else fa2_varlen,
        )
    elif name == "fa1":
        install_package(
            monkeypatch,
            "flash_attn.flash_attn_interface",
            {"flash-attn": "1.0.9"},
            flash_attn_unpadded_func=fa1_unpadded,
        )
    elif name == "aten":
        arguments = frozenset(("window_size_left", "window_size_right"))
        monkeypatch.setattr(torch_varlen, "_operator", lambda: (aten_forward, arguments))
        monkeypatch.setattr(torch_varlen, "_operator_backward", lambda: aten_backward)
    else:
        kernel = getattr(flash_stand_ins, name.replace("varlen_", "varlen_with_"))
        module = ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = kernel  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        monkeypatch.setattr(torch_varlen, "_operator", lambda: (None, frozenset()))
        torch_varlen._kernel.cache_clear()
    on_a_gpu(monkeypatch)
    forget_selections()
    return name.split("_")[0] if name.startswith("fa") else "torch_varlen"
