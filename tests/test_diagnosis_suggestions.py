"""The next step and the warnings, by tables of what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest

import diagnoses as on
from padless.diagnosis.report import Backend, Diagnosis, Gpu, Package, Torch, Transformers
from padless.diagnosis.suggestions import find_next_step, find_warnings

VERIFY = "run `padless verify"
FA4 = on.backends("fa4", "torch_varlen", "sdpa")
WITH_FA4 = on.packages(flash_attn_4=on.OK)
CPU_TORCH = Torch("2.11.0+cpu", cuda_fault="this build of torch is for the CPU alone")
OLD_DRIVER = Torch("2.11.0+cu130", "13.0", cuda_fault="RuntimeError: driver too old")


def _unseen(gpu: Gpu, torch: Torch, **changes: object) -> Diagnosis:
    """A machine whose driver sees the GPU, and whose torch does not."""
    driver = {"driver": "535.1", "driver_gpus": (gpu.name,)}
    return on.machine(None, torch=torch, **driver, **changes)


FA4_ON = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
H100_WITH_FA4 = on.machine(
    on.H100,
    packages=on.packages(flash_attn_4=replace(on.OK, version="4.0.0b36")),
    backends=FA4,
    choices=on.choices("fa4"),
    usual_dtype="bfloat16",
)
OPEN = tuple(
    replace(choice, backend=None, unmeasured=("fa4", "torch_varlen"))
    for choice in on.choices("fa4")
)

STEPS = {
    "fa4 that compiles in every process": (
        H100_WITH_FA4,
        f"set {FA4_ON}=1, so that FlashAttention-4 keeps its compiled kernels on disk",
    ),
    "fa4 that keeps its kernels": (
        replace(H100_WITH_FA4, variables={FA4_ON: "1"}),
        VERIFY,
    ),
    "fa4 whose variable is off": (
        replace(H100_WITH_FA4, variables={FA4_ON: "true"}),
        f"set {FA4_ON}=1",
    ),
    "an fa4 that may not know the variable": (
        replace(
            H100_WITH_FA4, packages=on.packages(flash_attn_4=replace(on.OK, version="4.0.0b5"))
        ),
        VERIFY,
    ),
    "fa4 that is not taken": (
        replace(H100_WITH_FA4, choices=on.choices("torch_varlen")),
        VERIFY,
    ),
    "something needed is not measured": (
        replace(H100_WITH_FA4, choices=OPEN),
        "run `padless doctor --all`, which measures what was left open: auto would ask fa4 and "
        "torch_varlen first for llama3-8b, bfloat16, inference",
    ),
    "something else is not measured": (
        replace(H100_WITH_FA4, choices=on.half_measured()),
        f"set {FA4_ON}=1",
    ),
    "interrupted": (
        replace(H100_WITH_FA4, is_interrupted=True),
        "run `padless doctor` again: it goes on where this one was interrupted",
    ),
    "interrupted before any answer": (
        replace(H100_WITH_FA4, backends=(), choices=(), is_interrupted=True),
        "run `padless doctor` again",
    ),
    "no GPU": (on.machine(None), "run `padless verify`, which"),
    "A100": (on.machine(on.A100), "run `padless verify --device cuda:0 --dtype bfloat16`"),
    "RTX 4090": (on.machine(on.RTX4090), VERIFY),
    "T4": (on.machine(on.T4, backends=on.backends("sdpa")), VERIFY),
    "MI300": (on.machine(on.MI300, torch=on.ROCM), VERIFY),
    "H100 without FA4": (on.machine(on.H100), "install FlashAttention-4, the fastest kernel"),
    "B200 without FA4": (on.machine(on.B200), "`pip install 'padless[fa4]'`"),
    "H100 with FA4": (on.machine(on.H100, packages=WITH_FA4, backends=FA4), VERIFY),
    "no torch": (
        on.machine(None, torch=Torch(None, fault="ModuleNotFoundError"), backends=()),
        "install torch: `pip install torch`",
    ),
    "broken torch": (
        on.machine(None, torch=Torch("2.11.0", fault="OSError: libcudart.so.13"), backends=()),
        "reinstall torch, which does not import",
    ),
    "no backend": (
        on.machine(None, backends=(), backends_fault="ImportError: x"),
        "no backend could be asked (ImportError: x)",
    ),
    "no transformers": (
        on.machine(
            on.H100,
            transformers=Transformers(None, "missing", tested=("4.28", "5.23")),
        ),
        "install transformers, whose LLaMA is what padless patches: "
        "`pip install 'transformers>=4.28,<6'`",
    ),
    "old transformers": (
        on.machine(
            on.H100,
            transformers=replace(on.TRANSFORMERS, version="4.20.0", support="too old"),
        ),
        "upgrade transformers 4.20.0, padless needs 4.28 or newer",
    ),
    "broken transformers": (
        on.machine(
            None, transformers=replace(on.TRANSFORMERS, state="broken", fault="SyntaxError")
        ),
        "reinstall transformers, whose LLaMA does not import (SyntaxError)",
    ),
    "transformers without its LLaMA": (
        on.machine(
            None,
            transformers=replace(
                on.TRANSFORMERS, version="6.1.0", state="broken", fault="x", support="newer"
            ),
        ),
        "`pip install 'transformers==5.23.*'`",
    ),
    "transformers that falls with flash-attn": (
        on.machine(
            on.A100,
            transformers=replace(on.TRANSFORMERS, state="broken", fault="x"),
            packages=on.packages(flash_attn=on.broken()),
        ),
        "mend flash-attn 2.8.3, which was built for another torch or CUDA",
    ),
    "a torch for the CPU": (
        _unseen(on.A100, CPU_TORCH),
        "install a torch with CUDA for the NVIDIA A100-SXM4-80GB",
    ),
    "a hidden GPU": (
        _unseen(on.A100, OLD_DRIVER, variables={"CUDA_VISIBLE_DEVICES": ""}),
        "unset CUDA_VISIBLE_DEVICES=''",
    ),
    "an old driver": (
        _unseen(on.A100, OLD_DRIVER),
        "mend the NVIDIA driver 535.1, or install a torch for an older CUDA than 13.0",
    ),
    "a GPU that torch was not built for": (
        on.machine(replace(on.T4, fault="RuntimeError: CUDA error: no kernel image is available")),
        "install a torch that is built for Tesla T4 (compute capability 7.5)",
    ),
    "undefined symbol": (
        on.machine(on.H100, packages=on.packages(flash_attn=on.broken())),
        "`pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir flash-attn`",
    ),
    "a flash-attn that takes FlashAttention-4 along": (
        on.machine(
            on.H100,
            packages=on.packages(flash_attn_4=on.broken(version="4.0"), flash_attn=on.broken()),
        ),
        "mend flash-attn 2.8.3",
    ),
    "GLIBC": (
        on.machine(on.A100, packages=on.packages(flash_attn=on.broken(on.GLIBC))),
        "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install",
    ),
    "an import that ends the program": (
        on.machine(
            None,
            packages=on.packages(flash_attn=on.broken("import x: the process died of SIGABRT")),
        ),
        "mend flash-attn 2.8.3, whose import ends or stops the program: remove it",
    ),
    "an import that hangs": (
        on.machine(None, packages=on.packages(flash_attn=on.broken("no answer within 60 s", None))),
        "mend flash-attn, whose import ends or stops the program",
    ),
    "another fault": (
        on.machine(on.H100, packages=on.packages(flash_attn_4=on.broken("TypeError: x"))),
        "which does not import: `pip install --force-reinstall",
    ),
    "broken Triton": (
        on.machine(on.A100, packages=on.packages(triton=on.broken("no C compiler", "3.6.0"))),
        "mend triton 3.6.0 (no C compiler)",
    ),
    "wrong numbers": (
        on.machine(
            on.H100,
            packages=WITH_FA4,
            backends=on.backends("sdpa", fa4=Backend("fa4", "wrong", ("computes wrong here: x",))),
        ),
        "upgrade or remove what fa4 runs on: auto passes it over, since it computes wrong here",
    ),
    "old torch": (
        on.machine(on.A100, torch=Torch("2.1.2+cu121", "12.1"), backends=on.backends("sdpa")),
        "upgrade torch 2.1.2+cu121: from 2.2 on",
    ),
}


@pytest.mark.parametrize("found, step", STEPS.values(), ids=STEPS.keys())
def test_the_next_step(found: Diagnosis, step: str) -> None:
    assert step in find_next_step(found)


def test_what_stands_in_the_way_of_more_comes_first() -> None:
    """Everything is wrong, and is mended one after the other."""
    found = on.machine(
        None,
        driver_gpus=("NVIDIA H100",),
        torch=Torch(None, fault="ModuleNotFoundError"),
        transformers=Transformers(None, "missing", tested=("4.28", "5.23")),
        packages=on.packages(flash_attn=on.broken()),
        backends=(),
    )
    assert find_next_step(found).startswith("install torch")
    found = replace(found, torch=CPU_TORCH, backends=on.backends("sdpa"))
    assert find_next_step(found).startswith("install transformers")
    found = replace(found, transformers=on.TRANSFORMERS)
    assert find_next_step(found).startswith("install a torch with CUDA")
    found = replace(found, torch=Torch("2.11.0+cu130", "13.0"), gpus=(on.H100,))
    assert find_next_step(found).startswith("mend flash-attn")
    found = replace(found, packages=on.packages())
    assert find_next_step(found).startswith("install FlashAttention-4")
    found = replace(found, packages=WITH_FA4, backends=FA4)
    assert find_next_step(found).startswith(VERIFY)


def test_a_missing_triton_is_named_where_there_is_a_gpu() -> None:
    missing = on.packages(triton=Package("triton", None, "missing"))
    assert "`pip install triton`" in find_next_step(on.machine(on.A100, packages=missing))
    assert VERIFY in find_next_step(on.machine(None, packages=missing))


@pytest.mark.parametrize("gpu, warned", [(on.H100, True), (on.B200, True), (on.H100_OFF, False)])
def test_plans_of_cudnn_are_warned_of_where_sdpa_takes_it(gpu: Gpu, warned: bool) -> None:
    (*said,) = find_warnings(on.machine(gpu))
    assert bool(said) is warned
    if warned:
        assert "builds a plan for every new length" in said[0]
        assert "969 ms, and 232 with lengths" in said[0]
        assert "torch.backends.cuda.enable_cudnn_sdp(False)" in said[0]


@pytest.mark.parametrize("gpu", [None, on.A100, on.RTX4090, on.T4])
def test_a_sound_machine_is_warned_of_nothing(gpu: Gpu | None) -> None:
    assert find_warnings(on.machine(gpu)) == ()


@pytest.mark.parametrize(
    "found, warning",
    [
        (
            on.machine(
                None, transformers=replace(on.TRANSFORMERS, version="5.30", support="newer")
            ),
            "transformers 5.30 is newer than what is tested (4.28 to 5.23)",
        ),
        (_unseen(on.A100, CPU_TORCH), "The driver sees NVIDIA A100-SXM4-80GB, torch does not"),
        (on.machine(replace(on.T4, fault="RuntimeError: x")), "cuda:0 (Tesla T4) does not compute"),
        (
            on.machine(on.A100, backends=on.backends(fa2=Backend("fa2", "crashed", ("died",)))),
            "fa2 ends the process that measures it: died.",
        ),
    ],
)
def test_warnings(found: Diagnosis, warning: str) -> None:
    assert warning in find_warnings(found)[0]
