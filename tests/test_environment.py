"""What this process can run, and what a broken installation looks like from here."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from padless import environment
from padless.environment import has_sdpa, import_optional, package_version


def test_package_version_reads_the_metadata() -> None:
    assert package_version("torch") == Version(importlib.metadata.version("torch"))


def test_package_version_is_none_for_what_is_missing_or_nonsense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert package_version("no-such-distribution-here") is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "not a version")
    assert package_version("torch") is None


def test_import_optional_gives_the_module() -> None:
    assert import_optional("torch") == (torch, "")


# What a missing package and one built for another torch raise, and what else some builds do.
@pytest.mark.parametrize(
    "body, reason",
    [
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("raise ImportError('DLL load failed\\nsecond line')", "ImportError: DLL load failed"),
        ("raise RuntimeError", "RuntimeError: "),
        ("import no_such_module_here", "ModuleNotFoundError: No module named"),
    ],
    ids=["oserror", "importerror", "without_text", "its_own_import"],
)
def test_import_optional_gives_the_reason_in_one_line(
    body: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extension.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    module, said = import_optional("broken_extension")
    assert module is None
    assert said.startswith(f"import broken_extension failed: {reason}")
    assert "\n" not in said


def test_import_optional_lets_the_user_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_extension.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_optional("slow_extension")


def test_has_sdpa_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_sdpa()
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    assert not has_sdpa()


@pytest.mark.parametrize(
    "version, expected",
    [("2.4.1", False), ("2.5.0", True), ("2.10.0+cu130", True), ("2.5.0a0+git1234", True)],
)
def test_has_sdpa_gqa_compares_versions_as_versions(
    version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert environment.has_sdpa_gqa.__wrapped__() is expected
