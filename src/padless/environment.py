"""What this process can run: versions, packages, GPUs. With `installed` the only reader of them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version

from padless.installed import cache_folder, import_optional, nvidia_driver, package_version

__all__ = [
    "PACKAGES",
    "autocasts",
    "cache_folder",
    "cuda_fault",
    "describe_gpu",
    "hardware",
    "has_fused_rms_norm",
    "has_sdpa",
    "has_sdpa_gqa",
    "import_optional",
    "is_capturing",
    "is_compiling",
    "is_tracing",
    "package_version",
    "ranks_per_host",
    "trial_device",
    "versions",
]

# What takes part in a run of a LLaMA, by distribution.
PACKAGES = (
    "torch", "triton", "transformers", "flash-attn-4", "flash-attn", "liger-kernel", "padless",
)  # fmt: skip
_AUTOCAST_BY_DEVICE = Version(torch.__version__).release >= (2, 4)


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
            driver=nvidia_driver()[0],
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    return found


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return " ".join(found[1].split()) if found else platform.machine() or "unknown"


def has_sdpa() -> bool:
    """Whether torch has fused scaled dot product attention (2.0 and later)."""
    return hasattr(F, "scaled_dot_product_attention")


@functools.cache
def has_sdpa_gqa() -> bool:
    """Whether torch's SDPA takes fewer KV heads than query heads (`enable_gqa`, 2.5 and later)."""
    return Version(torch.__version__).release >= (2, 5)


@functools.cache
def has_fused_rms_norm(device_type: str) -> bool:
    """Whether torch's `rms_norm` is one kernel on a device (CUDA, 2.9 and later).

    Elsewhere it is a composition of as many kernels as it has operations.
    """
    if device_type != "cuda" or not hasattr(F, "rms_norm"):
        return False
    name = "aten::_fused_rms_norm"
    try:
        # Private, and alone in knowing: older versions have the operator for Apple's GPUs alone.
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
    except (AttributeError, RuntimeError):
        # Versions that do not have the operator, or the question, any more or yet.
        return False


def ranks_per_host() -> int | None:
    """Reads how many processes torchrun has started on each host; None where it has not."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(found) if found.isdigit() and int(found) > 0 else None


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


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Tells in which dtype autocast computes products on a tensor's device, CUDA or CPU."""
    if _AUTOCAST_BY_DEVICE:
        return torch.get_autocast_dtype(tensor.device.type)
    return torch.get_autocast_gpu_dtype() if tensor.is_cuda else torch.get_autocast_cpu_dtype()


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


def cuda_fault() -> str | None:
    """Says why torch can use no GPU; None if it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch is for the CPU alone"
    try:
        torch.cuda.init()
    except Exception as error:
        return _first_line(error)
    return "torch sees no GPU"


def describe_gpu(index: int) -> dict[str, Any]:
    """Describes a GPU by what it is, and by whether it computes.

    Returns:
        `name`, `capability` ("9.0"; None for AMD's), `memory_bytes`, `default_sdpa` (the kernel
        that torch's SDPA takes by itself for a causal batch in half precision; None if it does not
        say) and `fault` (why nothing can be computed there; None if it can).
    """
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    described: dict[str, Any] = {
        "name": properties.name,
        "capability": None if torch.version.hip else f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "default_sdpa": None,
        "fault": None,
    }
    try:
        (torch.ones(1, device=device) + 1).item()
        described["default_sdpa"] = _default_sdpa(device)
    except Exception as error:
        described["fault"] = _first_line(error)
    return described


def _default_sdpa(device: torch.device) -> str | None:
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return None
    x = torch.zeros(1, 8, 256, 128, dtype=torch.float16, device=device)
    try:
        from torch.nn.attention import SDPBackend

        # Private, and alone in knowing: the order depends on GPU, cuDNN, version and switches.
        chosen = SDPBackend(choose(x, x, x, None, 0.0, True))
    except Exception:
        return None
    return str(chosen.name).lower()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
