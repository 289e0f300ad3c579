"""The report of `doctor()`: what was found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

# What became of a package: it imports, is not there, or is there and does not import.
State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Torch:
    """The torch that was found.

    Attributes:
        version: of it; None if there is none.
        cuda: version of CUDA that it is built for; None if for none.
        hip: version of HIP (AMD) that it is built for; None if for none.
        fault: why it cannot be imported; None if it can.
        cuda_fault: why it can use no GPU; None if it can.
    """

    version: str | None
    cuda: str | None = None
    hip: str | None = None
    fault: str | None = None
    cuda_fault: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees.

    Attributes:
        index: as in `cuda:0`.
        name: as its driver has it.
        capability: compute capability, as "9.0"; None for AMD's.
        memory_bytes: all of its memory.
        default_sdpa: kernel that torch's SDPA takes by itself there, such as "flash_attention" or
            "cudnn_attention"; None if torch does not say.
        fault: why nothing can be computed there; None if it can.
    """

    index: int
    name: str
    capability: str | None
    memory_bytes: int
    default_sdpa: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Package:
    """A package that padless uses where it is.

    Attributes:
        name: of the distribution, as pip has it.
        version: of it; None if its metadata are not there.
        state: "ok", "missing" or "broken".
        fault: what its import says, or a trial of it; empty if nothing is wrong.
    """

    name: str
    version: str | None
    state: State
    fault: str = ""


@dataclass(frozen=True)
class Transformers:
    """The transformers that was found.

    Attributes:
        version: of it; None if there is none.
        state: of its LLaMA: "ok", "missing" or "broken".
        fault: what its import says; empty if nothing is wrong.
        era: letter of padless's record of this version; None if there is none.
        change: what came new with the era.
        support: "tested", "newer" (than what is tested), "too old", or None without a version.
        tested: the oldest and the newest version with tests.
    """

    version: str | None
    state: State
    fault: str = ""
    era: str | None = None
    change: str | None = None
    support: Literal["tested", "newer", "too old"] | None = None
    tested: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Backend:
    """An attention backend, asked for the usual shapes.

    Attributes:
        name: of it.
        status: "accepted" by all usual requests or by some ("partly"); else why it serves none:
            "missing" (not installed), "broken" (does not import), "unfit" (this GPU, dtype or
            shape), "wrong" (failed its measurement) or "crashed" (ended the process that asked it);
            or "unmeasured": none of those that it was asked by now, others not measured yet.
        reasons: why it does not serve what it does not serve, each once.
        unmeasured: usual requests for which it has not been measured yet, so that nobody knows.
    """

    name: str
    status: Literal[
        "accepted", "partly", "missing", "broken", "unfit", "wrong", "crashed", "unmeasured"
    ]
    reasons: tuple[str, ...] = ()
    unmeasured: int = 0


@dataclass(frozen=True)
class Choice:
    """What `auto` takes for a usual request.

    Attributes:
        shape: name of the model.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of one head.
        dtype: as torch names it.
        training: whether gradients are asked for.
        backend: that `auto` takes; None if none serves, or if that is not known yet.
        padded_head_dim: what heads are padded to for it, head_dim as a rule; None without one.
        unmeasured: backends that `auto` would have to measure first, fastest first; empty if the
            choice is known.
    """

    shape: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    training: bool
    backend: str | None
    padded_head_dim: int | None
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What this machine can run, why not the rest, and what to do next.

    Attributes:
        padless: its version.
        python: version of Python.
        platform: of the machine.
        driver: version of the NVIDIA driver; None if none answers.
        driver_gpus: names of the GPUs that the driver sees, also those that torch does not.
        torch: the torch that was found.
        gpus: that torch sees.
        transformers: the transformers that was found.
        packages: triton, the flash-attn packages and Liger.
        device: where backends were asked: "cuda:0", or "cpu" where no GPU can be used.
        backends: every attention backend, fastest first.
        backends_fault: why no backend could be asked; None if they were.
        choices: what `auto` takes for usual LLaMAs.
        variables: environment variables that matter here, those that are set.
        cache: folder of padless's files, with what was measured of backends.
        warnings: what is wrong or slow, one sentence each.
        next_step: the one thing to do next.
        usual_dtype: that LLaMAs have on the device, which is measured first.
        is_interrupted: whether KeyboardInterrupt ended the measurements early.
    """

    padless: str
    python: str
    platform: str
    driver: str | None
    driver_gpus: tuple[str, ...]
    torch: Torch
    gpus: tuple[Gpu, ...]
    transformers: Transformers
    packages: tuple[Package, ...]
    device: str
    backends: tuple[Backend, ...]
    backends_fault: str | None
    choices: tuple[Choice, ...]
    variables: dict[str, str]
    cache: str
    warnings: tuple[str, ...] = ()
    next_step: str = ""
    usual_dtype: str = "float32"
    is_interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether at least one backend serves something here."""
        return any(backend.status in ("accepted", "partly") for backend in self.backends)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values by the names of the attributes, and `ok`."""
        return {"ok": self.ok, **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
