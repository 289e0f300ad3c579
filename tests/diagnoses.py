"""Machines that are not here: what `doctor` finds on GPUs of different kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from padless.diagnosis.report import (
    Backend,
    Choice,
    Diagnosis,
    Gpu,
    Package,
    Torch,
    Transformers,
)

GIB = 2**30
NAMES = ("fa4", "fa3", "torch_varlen", "fa2", "sdpa", "fa1", "reference")
DISTRIBUTIONS = ("triton", "flash-attn-4", "flash-attn-3", "flash-attn", "liger-kernel")
TRANSFORMERS = Transformers(
    "5.23.0", "ok", era="Q", change="no mask", support="tested", tested=("4.28", "5.23")
)
UNDEFINED = (
    "import flash_attn.flash_attn_interface failed: ImportError: /opt/venv/lib/python3.11/"
    "site-packages/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
    "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)
GLIBC = (
    "import flash_attn.flash_attn_interface failed: ImportError: /lib/x86_64-linux-gnu/libc.so.6: "
    "version `GLIBC_2.32' not found"
)


def packages(**states: Any) -> tuple[Package, ...]:
    """All packages, missing unless they are given by name, with "_" for "-"."""
    found = {name: Package(name, None, "missing") for name in DISTRIBUTIONS}
    found["triton"] = Package("triton", "3.6.0", "ok")
    for name, package in states.items():
        distribution = name.replace("_", "-")
        found[distribution] = replace(package, name=distribution)
    return tuple(found.values())


OK = Package("", "1.0", "ok")


def broken(fault: str = UNDEFINED, version: str | None = "2.8.3") -> Package:
    return Package("", version, "broken", fault)


def backends(*accepted: str, **others: Backend) -> tuple[Backend, ...]:
    """All backends: those named accept, the reference too, the rest is as given or unfit."""
    found = []
    for name in NAMES:
        rejected = others.get(name, Backend(name, "unfit", ("needs CUDA, got cpu",)))
        serves = name in (*accepted, "reference")
        found.append(Backend(name, "accepted") if serves else rejected)
    return tuple(found)


def choices(backend: str | None, padded: int | None = None) -> tuple[Choice, ...]:
    shapes = {
        "llama-7b": (32, 32, 128),
        "llama3-8b": (32, 8, 128),
        "smollm2-135m": (9, 3, 64),
    }
    return tuple(
        Choice(
            name,
            *sizes,
            dtype,
            training,
            "sdpa" if dtype == "float32" else backend,
            padded or sizes[2],
        )
        for name, sizes in shapes.items()
        for dtype in ("bfloat16", "float16", "float32")
        for training in (False, True)
    )


def half_measured() -> tuple[Choice, ...]:
    """What `auto` takes where FlashAttention-4 was measured for the most needed requests alone."""
    return tuple(
        choice
        if choice.dtype == "float32" or (choice.shape, choice.dtype) == ("llama3-8b", "bfloat16")
        else replace(choice, backend=None, padded_head_dim=None, unmeasured=("fa4",))
        for choice in choices("fa4")
    )


def machine(gpu: Gpu | None, **changes: Any) -> Diagnosis:
    """A sound machine with a GPU, or none, except for what is changed."""
    name = gpu.name if gpu else ""
    found = Diagnosis(
        padless="0.1.0",
        python="3.11.7",
        platform="Linux x86_64",
        driver="580.65.06" if gpu and gpu.capability else None,
        driver_gpus=(name,) if gpu and gpu.capability else (),
        torch=Torch("2.11.0+cu130", "13.0") if gpu else Torch("2.11.0+cpu", cuda_fault="CPU alone"),
        gpus=(gpu,) if gpu else (),
        transformers=TRANSFORMERS,
        packages=packages(),
        device="cuda:0" if gpu else "cpu",
        backends=backends("torch_varlen", "sdpa") if gpu else backends("sdpa"),
        backends_fault=None,
        choices=choices("torch_varlen" if gpu else "sdpa"),
        variables={},
        cache="/home/user/.cache/padless",
    )
    return replace(found, **changes)


H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "9.0", 80 * GIB, "cudnn_attention")
H100_OFF = replace(H100, default_sdpa="flash_attention")
A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", "8.0", 80 * GIB, "flash_attention")
RTX4090 = Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 * GIB, "flash_attention")
T4 = Gpu(0, "Tesla T4", "7.5", 15 * GIB, "efficient_attention")
B200 = Gpu(0, "NVIDIA B200", "10.0", 180 * GIB, "cudnn_attention")
MI300 = Gpu(0, "AMD Instinct MI300X", None, 192 * GIB, "flash_attention")

ROCM = Torch("2.11.0+rocm7.0", None, "7.0")
