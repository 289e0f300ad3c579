"""What this process can run, and what a broken installation looks like from here."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from padless import environment
from padless.environment import cuda_fault, describe_gpu, has_sdpa, import_optional, package_version
from padless.installed import is_found, nvidia_driver


def test_package_version_reads_the_metadata() -> None:
    assert package_version("torch") == Version(importlib.metadata.version("torch"))


def test_package_version_is_none_for_what_is_missing_or_nonsense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert package_version("no-such-distribution-here") is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "not a version")
    assert package_version("torch") is None


@pytest.mark.parametrize(
    "module, expected",
    [
        ("planted", True),
        ("planted.part", True),
        ("planted.folder.inner", True),
        ("planted.folder.other", False),
        ("planted.part.inner", False),
        ("not_planted", False),
        ("not_planted.part", False),
    ],
)
@pytest.mark.parametrize("is_namespace", [False, True], ids=["package", "namespace"])
def test_is_found_looks_and_imports_nothing(
    module: str, expected: bool, is_namespace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "planted"
    (folder / "folder").mkdir(parents=True)
    for file in ("part.py", "folder/inner.py", *([] if is_namespace else ["__init__.py"])):
        (folder / file).write_text("raise OSError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_found(module) is expected


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


def test_cuda_fault_tells_a_build_for_the_cpu_from_a_driver_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        raise RuntimeError("the NVIDIA driver on your system is too old\nupdate it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_fault() == "this build of torch is for the CPU alone"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert cuda_fault() == "RuntimeError: the NVIDIA driver on your system is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_fault() is None


def _pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Z999", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)


def test_describe_gpu_says_that_a_gpu_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "ones", ones)
    found = describe_gpu(0)
    assert (found["name"], found["capability"]) == ("Z999", "9.0")
    assert found["fault"] == "RuntimeError: CUDA error: no kernel image is available"
    assert found["default_sdpa"] is None


def test_describe_gpu_asks_torch_which_kernel_sdpa_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.device
    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(environment.torch, "device", lambda *name: real("cpu"))
    found = describe_gpu(0)
    assert found["fault"] is None
    assert found["default_sdpa"] in ("flash_attention", "math")
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *arguments: 3)
    assert describe_gpu(0)["default_sdpa"] == "cudnn_attention"
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert describe_gpu(0)["default_sdpa"] is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert describe_gpu(0)["capability"] is None


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    "script, expected",
    [
        (
            "echo '580.1, NVIDIA A, B'; echo '580.1, NVIDIA C'",
            ("580.1", ("NVIDIA A, B", "NVIDIA C")),
        ),
        ("echo 'NVIDIA-SMI has failed, no driver'; exit 9", (None, ())),
        ("exit 0", (None, ())),
        ("exec sleep 60", (None, ())),
    ],
    ids=["two_gpus", "fails", "says_nothing", "hangs"],
)
def test_nvidia_driver(
    script: str, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_driver(limit_s=2.0) == expected


def test_nvidia_driver_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert nvidia_driver() == (None, ())


@pytest.mark.parametrize("by_device", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_autocast_is_told_by_every_torch(
    by_device: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_device and not environment._AUTOCAST_BY_DEVICE:
        pytest.skip("this torch asks for each kind of device by another name")
    monkeypatch.setattr(environment, "_AUTOCAST_BY_DEVICE", by_device)
    with torch.autocast("cpu", dtype), warnings.catch_warnings():
        # The names of older versions are deprecated in newer ones.
        warnings.simplefilter("ignore")
        assert environment.autocast_dtype(torch.ones(1)) == dtype
