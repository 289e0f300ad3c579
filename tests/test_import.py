"""What importing padless does, seen in a fresh process that has torch and nothing optional."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import padless

# Imports padless with every optional package refused, and writes what it saw to a file.
CHILD = """
import contextlib, importlib, io, json, logging, os, pkgutil, random, sys, warnings

import torch

OPTIONAL = {
    "accelerate", "flash_attn", "flash_attn_interface", "gguf", "liger_kernel", "matplotlib",
    "peft", "safetensors", "tensorboard", "transformers", "triton", "trl",
}

class Refuse:
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            self.asked.append(name)
            raise ImportError(f"{name} is refused")
        return None

def state():
    cuda = torch.backends.cuda
    return {
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": [cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "torch_random": torch.random.get_rng_state().tolist(),
        "random": repr(random.getstate()),
        "environ": dict(os.environ),
        "path": list(sys.path),
        "finders": [repr(finder) for finder in sys.meta_path],
        "warnings": [repr(item) for item in warnings.filters],
        "root_handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "root_level": logging.getLogger().level,
    }

for name in [name for name in sys.modules if name.split(".")[0] in OPTIONAL]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
said, saw = io.StringIO(), {}
before, known = state(), set(sys.modules)
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import padless
    saw["own_modules"] = sorted(n for n in set(sys.modules) - known if n.startswith("padless"))
    layout = padless.VarlenLayout.from_lengths([2, 1])
    q = torch.zeros(3, 2, 4)
    saw["shape"] = list(padless.varlen_attention(q, q, q, layout).shape)
    saw["asked"] = list(Refuse.asked)
    after = state()
    saw["changed"] = [key for key in before if before[key] != after[key]]
    saw["modules"] = {}
    found = [m.name for m in pkgutil.walk_packages(padless.__path__, "padless.", onerror=id)]
    for name in [*found, "internvl.patch.llama_flash_attn_monkey_patch"]:
        if name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(name)
            saw["modules"][name] = None
        except Exception as error:
            saw["modules"][name] = f"{type(error).__name__}: {error}"
saw["said"] = said.getvalue()
saw["cuda"] = torch.cuda.is_initialized()
with open(sys.argv[1], "w") as file:
    json.dump(saw, file)
"""


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the fresh process wrote down."""
    report = tmp_path_factory.mktemp("import") / "saw.json"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(report)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=report.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(report.read_text()))


def test_attention_works_with_nothing_optional_installed(saw: dict[str, Any]) -> None:
    assert saw["shape"] == [3, 2, 4]


def test_importing_padless_imports_no_module_of_it_and_asks_for_nothing_optional(
    saw: dict[str, Any],
) -> None:
    assert saw["own_modules"] == ["padless"]
    assert saw["asked"] == []


def test_importing_padless_prints_nothing(saw: dict[str, Any]) -> None:
    assert saw["said"] == ""


def test_importing_padless_changes_no_global_state(saw: dict[str, Any]) -> None:
    assert saw["changed"] == []


def test_importing_every_module_touches_no_gpu(saw: dict[str, Any]) -> None:
    assert saw["cuda"] is False


def test_every_module_imports_without_transformers(saw: dict[str, Any]) -> None:
    failed = {name: error for name, error in saw["modules"].items() if error}
    # A kernel is written in Triton, and imported only where Triton is.
    kernels = ("merge", "rotary_keep", "rotary", "silu_mul", "unpad")
    with_triton = [f"padless.kernels.{name}_triton" for name in kernels]
    assert failed == dict.fromkeys(with_triton, "ImportError: triton is refused")
    # The walk went through every folder, so that an empty walk does not pass.
    root = Path(padless.__file__).parent
    for file in root.rglob("*.py"):
        name = ".".join(("padless", *file.relative_to(root).with_suffix("").parts))
        if not name.endswith(".__main__"):
            assert name.removesuffix(".__init__") in {*saw["modules"], "padless"}


@pytest.mark.parametrize("name", padless.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(padless, name)
    assert value is not None
    assert getattr(value, "__name__", name) == name
    assert name in dir(padless)


def test_every_lazy_name_is_public_and_the_list_is_sorted() -> None:
    assert sorted(padless._HOME) == padless.__all__ == sorted(padless.__all__)


def test_unknown_name_raises_as_a_module_does() -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(padless, "patch_everything")  # noqa: B009
    assert str(caught.value) == "module 'padless' has no attribute 'patch_everything'"
    assert not hasattr(padless, "_private_thing")


def test_dir_lists_the_version_too() -> None:
    assert "__version__" in dir(padless)
