"""What this process can run: versions and importable packages. The only reader of them."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import InvalidVersion, Version

# What takes part in a run of a LLaMA, by distribution.
PACKAGES = (
    "torch", "triton", "transformers", "flash-attn-4", "flash-attn", "liger-kernel", "padless",
)  # fmt: skip
_AUTOCAST_BY_DEVICE = Version(torch.__version__).release >= (2, 4)


def package_version(distribution: str) -> Version | None:
    """Reads the version of an installed distribution; None if it is not installed."""
    try:
        return Version(importlib.metadata.version(distribution))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def versions() -> dict[str, str | None]:
    """Reads the versions of Python and of everything that takes part; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)
    if found["padless"] is None:
        import padless

        found["padless"] = getattr(padless, "__version__", "from source")
    return found


def hardware(device: torch.device | str) -> dict[str, Any]:
    """Reads what a run on a device depends on: processor, cores, threads, and the GPU if it is one.

    Args:
        device: "cpu", "cuda", "cuda:1", ...

    Returns:
        Entries of a record: types that JSON knows, `device` being the name for people.
    """
    device = torch.device(device)
    found: dict[str, Any] = {
        "kind": device.type,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
    }
    found["device"] = found["cpu"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.update(
            device=properties.name,
            gpus=torch.cuda.device_count(),
            memory_bytes=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            driver=first_line_of(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    return found


def first_line_of(*command: str) -> str | None:
    """Runs a command and returns the first line it prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return " ".join(found[1].split()) if found else platform.machine() or "unknown"


def import_optional(module: str) -> tuple[ModuleType | None, str]:
    """Imports a package that may be missing or broken.

    Returns:
        The module and an empty string, or None and the reason in one line. A compiled extension
        built for another torch raises OSError or ImportError on loading, some builds anything else:
        each is a reason here and never an error of the caller.
    """
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        # Not BaseException: Ctrl-C during a slow import must still end the program.
        lines = str(error).splitlines() or [""]
        return None, f"import {module} failed: {type(error).__name__}: {lines[0]}"


def cache_folder() -> Path:
    """Finds where padless keeps files between runs: `$PADLESS_CACHE`, else the user's cache."""
    if own := os.environ.get("PADLESS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "padless"


def has_sdpa() -> bool:
    """Whether torch has fused scaled dot product attention (2.0 and later)."""
    return hasattr(F, "scaled_dot_product_attention")


@functools.cache
def has_sdpa_gqa() -> bool:
    """Whether torch's SDPA takes fewer KV heads than query heads (`enable_gqa`, 2.5 and later)."""
    return Version(torch.__version__).release >= (2, 5)


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is tracing this call."""
    compiler = getattr(torch, "compiler", None)
    if compiler is not None and hasattr(compiler, "is_compiling"):
        return bool(compiler.is_compiling())
    return bool(torch._dynamo.is_compiling())


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for a tensor's device, CUDA or CPU."""
    if _AUTOCAST_BY_DEVICE:
        return torch.is_autocast_enabled(tensor.device.type)
    return torch.is_autocast_enabled() if tensor.is_cuda else torch.is_autocast_cpu_enabled()


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether work on the tensor's device is being captured as a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_tracing() -> bool:
    """Whether torch.jit is tracing this call."""
    return bool(torch._C._get_tracing_state())


def trial_device() -> torch.device:
    """Where a small model of transformers can run: on the GPU once Liger is in this process.

    Liger replaces functions of transformers by Triton kernels for every model, also for one on the
    CPU, where they cannot run.
    """
    with_liger = "liger_kernel" in sys.modules and torch.cuda.is_available()
    return torch.device("cuda" if with_liger else "cpu")
