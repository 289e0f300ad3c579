"""`doctor`: asks all its questions in processes of their own and puts the answers together."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import padless
from padless.diagnosis.backends import Progress, ask_backends
from padless.diagnosis.child import NoAnswerError, ask, end_all
from padless.diagnosis.need import usual_dtype
from padless.diagnosis.report import (
    Backend,
    Choice,
    Diagnosis,
    Gpu,
    Package,
    State,
    Torch,
    Transformers,
)
from padless.diagnosis.suggestions import find_next_step, find_warnings
from padless.errors import UnsupportedError
from padless.hf.eras import NEWEST_TESTED, OLDEST, era_of
from padless.installed import cache_folder, is_found, nvidia_driver, package_version

# Distribution and the module of it that padless imports.
PACKAGES = {
    "triton": "triton",
    "flash-attn-4": "flash_attn.cute.interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn.flash_attn_interface",
    "liger-kernel": "liger_kernel",
}
_LLAMA = "transformers.models.llama.modeling_llama"
# Names, or beginnings of names that end in "_".
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "FLASH_ATTENTION_",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PADLESS_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_COMPILE_DISABLE",
    "TORCH_CUDNN_SDPA_",
    "TORCH_CUDNN_V8_API_",
    "TRANSFORMERS_",
    "TRITON_",
)


def doctor(
    *,
    limit_s: float = 60.0,
    seconds: float | None = None,
    on_progress: Progress | None = None,
) -> Diagnosis:
    """Finds out what this machine can run, why not the rest, and what to do next.

    Args:
        limit_s: how long each import may take, in seconds, before it counts as broken. A backend's
            measurement, which may compile kernels, may take five times as long.
        seconds: behind which no measurement of a backend is begun; `math.inf` measures everything,
            0 nothing. None is 20 for what is needed most, which is training and inference of
            llama3-8b in the dtype of this machine, and 5 for the rest.
        on_progress: called with (stage, done, total): what is being asked; 0 of 0 while packages
            are imported.

    Returns:
        The facts; `as_dict()` gives JSON values. KeyboardInterrupt ends the measurements early:
        `is_interrupted` is True then, and what was found until then is there.

    Raises:
        ValueError: limit_s is not positive, or seconds is negative.

    Note:
        torch, transformers and all optional packages are imported in processes of their own: one
        that raises, ends its process or hangs is part of the report. Backends are measured in the
        order of need, and their verdicts kept on disk: a later call takes a few seconds, and goes
        on where this one stopped.
    """
    if not limit_s > 0:
        raise ValueError(f"limit_s must be a positive number of seconds, got {limit_s!r}")
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, or None, got {seconds!r}")
    tell = on_progress or (lambda *_: None)
    tell("importing torch and transformers", 0, 0)
    with ThreadPoolExecutor(max_workers=4) as pool:
        try:
            asked_driver = pool.submit(nvidia_driver)
            asked_torch = pool.submit(_ask_torch, limit_s)
            asked_llama = pool.submit(_ask_package, "transformers", _LLAMA, limit_s)
            asked = [pool.submit(_ask_package, *package, limit_s) for package in PACKAGES.items()]
            driver, driver_gpus = asked_driver.result()
            torch, gpus = asked_torch.result()
            transformers = _with_era(asked_llama.result())
            packages = tuple(future.result() for future in asked)
        except KeyboardInterrupt:
            # Threads wait for processes that an interrupt does not reach.
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise
    usable = [gpu for gpu in gpus if gpu.fault is None]
    device = f"cuda:{usable[0].index}" if usable else "cpu"
    if usable:
        tell("trying Triton", 0, 0)
        packages = tuple(
            _try_triton(package, usable[0].index, limit_s) if package.name == "triton" else package
            for package in packages
        )
    dtype = usual_dtype(device, usable[0].capability if usable else None)
    backends: tuple[Backend, ...] = ()
    choices: tuple[Choice, ...] = ()
    fault, is_interrupted = "torch does not import" if torch.fault else None, False
    if not torch.fault:
        tell("asking attention backends", 0, 0)
        try:
            backends, choices, is_interrupted = ask_backends(
                device, dtype, packages, limit_s, seconds=seconds, on_progress=tell
            )
        except NoAnswerError as error:
            fault = str(error)
        if is_interrupted and not backends:
            fault = "interrupted before any of them was asked"
    found = Diagnosis(
        padless=padless.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        driver=driver,
        driver_gpus=driver_gpus,
        torch=torch,
        gpus=gpus,
        transformers=transformers,
        packages=packages,
        device=device,
        backends=backends,
        backends_fault=fault,
        choices=choices,
        variables=_variables(),
        cache=_cache(),
        usual_dtype=dtype,
        is_interrupted=is_interrupted,
    )
    return replace(found, warnings=find_warnings(found), next_step=find_next_step(found))


def _ask_torch(limit_s: float) -> tuple[Torch, tuple[Gpu, ...]]:
    installed = package_version("torch")
    torch = Torch(version=None if installed is None else str(installed))
    gpus: list[Gpu] = []
    is_imported = False
    try:
        for found in ask("torch", limit_s=limit_s):
            if "torch" in found:
                torch, is_imported = Torch(**found["torch"]), True
            elif "gpu" in found:
                gpus.append(Gpu(**found["gpu"]))
            else:
                torch = replace(torch, cuda_fault=found["cuda_fault"])
    except NoAnswerError as error:
        if not is_imported:
            return replace(torch, fault=str(error)), ()
        # What it had found by then holds; GPUs behind the one that ended it are unknown.
        torch = replace(torch, cuda_fault=f"while asking for its GPUs: {error}")
    return torch, tuple(gpus)


def _ask_package(name: str, module: str, limit_s: float) -> Package:
    installed = package_version(name)
    version = None if installed is None else str(installed)
    if installed is None and not is_found(module):
        # Its folder may be there, of another package: FlashAttention-4 lies beside 2.
        return Package(name, None, "missing")
    try:
        (fault,) = ask("import", module, limit_s=limit_s)
    except NoAnswerError as error:
        return Package(name, version, "broken", f"import {module}: {error}")
    state: State = "broken" if fault else "ok"
    if installed is None and "ModuleNotFoundError" in fault:
        # Some releases of flash-attn carry the sources of FlashAttention-4, not what these need.
        state = "missing"
    return Package(name, version, state, fault)


def _with_era(package: Package) -> Transformers:
    found = Transformers(
        package.version, package.state, package.fault, tested=(str(OLDEST), str(NEWEST_TESTED))
    )
    version = package_version("transformers")
    if version is None:
        return found
    try:
        era = era_of(version)
    except UnsupportedError:
        return replace(found, support="too old")
    newer = version.release[:2] > NEWEST_TESTED.release[:2]
    support: Any = "newer" if newer else "tested"
    return replace(found, era=era.name, change=era.change, support=support)


def _try_triton(package: Package, gpu: int, limit_s: float) -> Package:
    if package.state != "ok":
        return package
    try:
        (fault,) = ask("triton", gpu, limit_s=limit_s)
    except NoAnswerError as error:
        fault = f"a kernel on cuda:{gpu}: {error}"
    return replace(package, state="broken", fault=fault) if fault else package


def _variables() -> dict[str, str]:
    def matters(name: str) -> bool:
        return any(name == v or (v.endswith("_") and name.startswith(v)) for v in _VARIABLES)

    return {name: os.environ[name] for name in sorted(os.environ) if matters(name)}


def _cache() -> str:
    try:
        return str(cache_folder())
    except RuntimeError as error:
        # No home folder.
        return f"none: {error}"
