"""What is wrong or slow, and the one thing to do next: pure functions of what was found."""

from __future__ import annotations

from packaging.version import Version

from padless.diagnosis.need import Usual, most_needed
from padless.diagnosis.report import Diagnosis, Package

_CLEAN = "--force-reinstall --no-deps --no-cache-dir"
_FA4_GPUS = ("9.", "10.")
# Its `flash_attn/cute/cache_utils.py` reads the variable when it is imported; off by default.
_FA4_CACHE = Version("4.0.0b36")
_FA4_CACHE_VARIABLE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
# torch's own varlen kernel.
_VARLEN_TORCH = (2, 2)


def find_warnings(found: Diagnosis) -> tuple[str, ...]:
    """Says what is wrong or slow here, one sentence each."""
    warnings = []
    for gpu in found.gpus:
        if gpu.fault:
            warnings.append(f"cuda:{gpu.index} ({gpu.name}) does not compute: {gpu.fault}.")
    if found.driver_gpus and not found.gpus and found.torch.fault is None:
        fault = found.torch.cuda_fault or "torch sees no GPU"
        warnings.append(f"The driver sees {found.driver_gpus[0]}, torch does not: {fault}.")
    # benchmarks/results/step-nvidia-h100-80gb-hbm3.json: 6 layers of LLaMA-3-8B's width with Liger,
    # 8 x 2048, torch 2.11, 2026-11-25.
    planning = [gpu for gpu in found.gpus if gpu.default_sdpa == "cudnn_attention"]
    if planning:
        warnings.append(
            f"On {planning[0].name} the default SDPA of an unpatched model is cuDNN's, which "
            "builds a plan for every new length: on an H100 a training step with new lengths took "
            "969 ms, and 232 with lengths that it had met. padless's own attention never calls "
            "it; for models that are not patched, call "
            "torch.backends.cuda.enable_cudnn_sdp(False)."
        )
    transformers = found.transformers
    if transformers.support == "newer":
        warnings.append(
            f"transformers {transformers.version} is newer than what is tested "
            f"({' to '.join(transformers.tested)}): patching tries itself first, and raises if "
            "anything differs."
        )
    for backend in found.backends:
        if backend.status == "crashed":
            warnings.append(
                f"{backend.name} ends the process that measures it: {backend.reasons[0]}."
            )
    return tuple(warnings)


def find_next_step(found: Diagnosis) -> str:
    """Finds the one thing to do next, the most useful first."""
    return (
        _mend_torch(found)
        or _mend_transformers(found)
        or _reach_the_gpu(found)
        or _mend_packages(found)
        or _add_a_faster_kernel(found)
        or _measure_the_rest(found)
        or _keep_compiled_kernels(found)
        or _try_it(found)
    )


def _mend_torch(found: Diagnosis) -> str | None:
    torch = found.torch
    if torch.version is None:
        return "install torch: `pip install torch`"
    if torch.fault:
        return f"reinstall torch, which does not import: `pip install {_CLEAN} torch`"
    if not found.ok and not found.is_interrupted:
        return f"reinstall padless and torch: no backend could be asked ({found.backends_fault})"
    return None


def _mend_transformers(found: Diagnosis) -> str | None:
    transformers, (oldest, newest) = found.transformers, found.transformers.tested
    wanted = f"`pip install 'transformers>={oldest},<6'`"
    if transformers.version is None and transformers.state == "missing":
        return f"install transformers, whose LLaMA is what padless patches: {wanted}"
    if transformers.support == "too old":
        return (
            f"upgrade transformers {transformers.version}, padless needs {oldest} or newer: "
            f"{wanted}"
        )
    if transformers.state != "broken":
        return None
    # It imports flash-attn where it finds one, and falls with it.
    if any(p.state == "broken" and p.name.startswith("flash-attn") for p in found.packages):
        return _mend_packages(found)
    if transformers.support == "newer":
        return (
            f"install a transformers that is tested, since {transformers.version} has no LLaMA "
            f"that imports: `pip install 'transformers=={newest}.*'`"
        )
    return (
        f"reinstall transformers, whose LLaMA does not import ({transformers.fault}): "
        f"`pip install --force-reinstall 'transformers=={transformers.version}'`"
    )


def _reach_the_gpu(found: Diagnosis) -> str | None:
    torch = found.torch
    for gpu in found.gpus:
        if gpu.fault and "no kernel image" in gpu.fault:
            return (
                f"install a torch that is built for {gpu.name} (compute capability "
                f"{gpu.capability}), as https://pytorch.org/get-started/locally says: torch "
                f"{torch.version} is not"
            )
    if not found.driver_gpus or found.gpus:
        return None
    gpu_name = found.driver_gpus[0]
    hidden = found.variables.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda is None and torch.hip is None:
        return (
            f"install a torch with CUDA for the {gpu_name}, as "
            f"https://pytorch.org/get-started/locally says: torch {torch.version} is for the CPU "
            "alone"
        )
    if hidden is not None:
        return f"unset CUDA_VISIBLE_DEVICES={hidden!r}, if torch is meant to use the {gpu_name}"
    return (
        f"mend the NVIDIA driver {found.driver}, or install a torch for an older CUDA than "
        f"{torch.cuda}: torch cannot use the {gpu_name} ({torch.cuda_fault})"
    )


def _mend_packages(found: Diagnosis) -> str | None:
    broken = [package for package in found.packages if package.state == "broken"]
    if broken:
        # FlashAttention-4 lies in the folder of flash-attn, and falls with it.
        return mend(min(broken, key=lambda package: package.name != "flash-attn"))
    for backend in found.backends:
        if backend.status in ("wrong", "crashed"):
            return (
                f"upgrade or remove what {backend.name} runs on: auto passes it over, since it "
                f"{'computes wrong' if backend.status == 'wrong' else 'ends its process'} here"
            )
    return None


def mend(package: Package) -> str:
    """Says how to mend a broken package, by what its import said."""
    name, fault = package.name, package.fault
    what = f"mend {name} {package.version or ''}".rstrip()
    if name == "triton":
        return f"{what} ({fault}): it needs a C compiler, and the version that torch asks for"
    remove = f"remove it, padless does without: `pip uninstall {name}`"
    if "GLIBC" in fault:
        return (
            f"{what}, which was built on a newer Linux than this one: build it here, "
            f"`FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation {_CLEAN} {name}`, "
            f"or {remove}"
        )
    if "undefined symbol" in fault or "cannot open shared object" in fault or "DLL load" in fault:
        return (
            f"{what}, which was built for another torch or CUDA: build it again, "
            f"`pip install --no-build-isolation {_CLEAN} {name}`, or {remove}"
        )
    if "the process" in fault or "no answer" in fault:
        return f"{what}, whose import ends or stops the program: {remove}"
    return f"{what}, which does not import: `pip install {_CLEAN} {name}`, or {remove}"


def _add_a_faster_kernel(found: Diagnosis) -> str | None:
    usable = [gpu for gpu in found.gpus if gpu.fault is None]
    if not usable:
        return None
    gpu = usable[0]
    accepted = {b.name for b in found.backends if b.status in ("accepted", "partly")}
    if (gpu.capability or "").startswith(_FA4_GPUS) and "fa4" not in accepted:
        fa4 = [package for package in found.packages if package.name == "flash-attn-4"]
        if not fa4 or fa4[0].state == "missing":
            return (
                f"install FlashAttention-4, the fastest kernel on {gpu.name}: "
                "`pip install 'padless[fa4]'`"
            )
    if _release(found.torch.version) < _VARLEN_TORCH and found.torch.hip is None:
        return (
            f"upgrade torch {found.torch.version}: from 2.2 on it has an attention kernel for "
            "sequences of any lengths, which needs no other package"
        )
    triton = [package for package in found.packages if package.name == "triton"]
    if triton and triton[0].state == "missing":
        return (
            "install the Triton of your torch (`pip install triton`): it rotates q and k in one "
            "kernel, and makes a padded batch flat in two"
        )
    return None


def _measure_the_rest(found: Diagnosis) -> str | None:
    if found.is_interrupted:
        return "run `padless doctor` again: it goes on where this one was interrupted"
    needed = most_needed(found.usual_dtype)
    for choice in found.choices:
        usual = Usual(choice.shape, choice.dtype, choice.training)
        if usual in needed and choice.unmeasured:
            return (
                f"run `padless doctor --all`, which measures what was left open: auto would ask "
                f"{' and '.join(choice.unmeasured)} first for {usual}, and nobody has measured "
                "that yet"
            )
    return None


def _keep_compiled_kernels(found: Diagnosis) -> str | None:
    version = next((p.version for p in found.packages if p.name == "flash-attn-4"), None)
    serves = any(c.backend == "fa4" and c.dtype == found.usual_dtype for c in found.choices)
    if not serves or version is None or Version(version) < _FA4_CACHE:
        return None
    if found.variables.get(_FA4_CACHE_VARIABLE) == "1":
        return None
    return (
        f"set {_FA4_CACHE_VARIABLE}=1, so that FlashAttention-4 keeps its compiled kernels on disk "
        "(in the folder FLASH_ATTENTION_CUTE_DSL_CACHE_DIR): without it every process compiles "
        "them again"
    )


def _try_it(found: Diagnosis) -> str:
    usable = any(gpu.fault is None for gpu in found.gpus)
    options = f" --device {found.device} --dtype bfloat16" if usable else ""
    return f"run `padless verify{options}`, which shows that a patched model is the same model"


def _release(version: str | None) -> tuple[int, ...]:
    parts = (version or "0").split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())
