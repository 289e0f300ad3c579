"""What is asked in a process of its own: everything that imports torch or a foreign package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from padless.diagnosis.child import write_answers
from padless.installed import import_optional

if TYPE_CHECKING:
    import torch

    from padless.backends.request import AttentionRequest

# Heads, KV heads and head_dim of the models that people patch.
USUAL_SHAPES = {
    "llama-7b": (32, 32, 128),
    "llama3-8b": (32, 8, 128),
    "smollm2-135m": (9, 3, 64),
}
DTYPES = ("bfloat16", "float16", "float32")


def answer(question: str, argument: Any) -> None:
    """Answers a question through what was standard output; the process does nothing else."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What packages print while they load must not come between the answers.
    os.dup2(2, 1)
    write_answers(answers, _QUESTIONS[question](argument))


def _import(module: str) -> Iterator[str]:
    """Answers with the reason why a module cannot be imported, empty if it can."""
    yield import_optional(module)[1]


def _torch(_: None) -> Iterator[dict[str, Any]]:
    """Answers with what torch is, then with one GPU after the other, since each may end it."""
    import torch

    from padless.environment import cuda_fault, describe_gpu

    built_for = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    yield {"torch": {"version": str(torch.__version__), **built_for}}
    fault = cuda_fault()
    yield {"cuda_fault": fault}
    if fault is None:
        for index in range(torch.cuda.device_count()):
            yield {"gpu": {"index": index, **describe_gpu(index)}}


def _triton(index: int) -> Iterator[str | None]:
    """Answers with the reason why Triton's kernels cannot run on a GPU, None if they can."""
    import torch

    from padless.kernels.rotary import rotary_backend

    yield rotary_backend(torch.zeros(1, 1, 8, device=torch.device("cuda", index))).reason


def _backends(argument: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers with every backend's answer to every usual request, saying first which it asks.

    The argument's `device` is where; `done` lists what needs no answer, `[backend, request]`.
    """
    import torch

    from padless.selection import BACKENDS

    requests = usual_requests(torch.device(argument["device"]))
    done = {tuple(pair) for pair in argument["done"]}
    yield {"backends": list(BACKENDS)}
    for name in BACKENDS:
        for number, request in enumerate(requests):
            if (name, number) not in done:
                yield {"asking": [name, number]}
                yield {"asked": [name, number], **_ask_one(name, request)}


def usual_requests(device: torch.device) -> list[AttentionRequest]:
    """Makes the requests of usual LLaMAs: by shape, then dtype, then forward and training."""
    import torch

    from padless.backends.request import AttentionRequest

    return [
        AttentionRequest(
            device,
            getattr(torch, dtype),
            head_dim,
            heads,
            kv_heads,
            causal=True,
            needs_grad=training,
        )
        for heads, kv_heads, head_dim in USUAL_SHAPES.values()
        for dtype in DTYPES
        for training in (False, True)
    ]


def _ask_one(name: str, request: AttentionRequest) -> dict[str, Any]:
    """Asks one backend as `auto` would: by what it takes, then by its numbers."""
    from padless.selection import BACKENDS, select_backend

    # The reference takes what is left, so that there is always an answer.
    others = dict.fromkeys(set(BACKENDS) - {name, "reference"}, "another one is asked")
    selection = select_backend(request, passing_over=others)
    if selection.name == name:
        return {"rejected": None, "head_dim": selection.head_dim}
    reason = next(c.rejected for c in selection.trace if c.name == name)
    return {"rejected": reason, "head_dim": request.head_dim}


_QUESTIONS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "import": _import,
    "torch": _torch,
    "triton": _triton,
    "backends": _backends,
}
