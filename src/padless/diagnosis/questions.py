"""What is asked in a process of its own: everything that imports torch or a foreign package."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from padless.diagnosis.child import write_answers
from padless.diagnosis.need import REQUESTS, USUAL_SHAPES, Budget, in_order_of_need, most_needed
from padless.installed import import_optional

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from padless.backends.request import AttentionRequest

Pair = tuple[str, int]


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

    What is known without a measurement comes first; then it measures in the order of need, until
    the budget is spent. What has no answer then was not measured.

    The argument's `device` is where; `dtype` is the one that LLaMAs have there; `done` lists what
    needs no answer, `[backend, request]`, and `accepted` what of it accepts; `seconds` and `spent`
    are those of `Budget`.
    """
    import torch

    from padless.selection import BACKENDS

    requests = usual_requests(torch.device(argument["device"]))
    done = {tuple(pair) for pair in argument["done"]}
    yield {"backends": list(BACKENDS)}
    open_pairs: set[Pair] = set()
    accepted: set[Pair] = {(name, number) for name, number in argument["accepted"]}
    for name in BACKENDS:
        for number, request in enumerate(requests):
            if (name, number) in done:
                continue
            yield {"asking": [name, number]}
            found = _ask_one(name, request, lambda *_: False)
            if found is None:
                open_pairs.add((name, number))
                continue
            if found["rejected"] is None:
                accepted.add((name, number))
            yield {"asked": [name, number], **found}
    budget = Budget(argument["seconds"], argument["spent"])
    yield from measure(requests, argument["dtype"], budget, open_pairs, accepted)


def measure(
    requests: list[AttentionRequest],
    dtype: str,
    budget: Budget,
    open_pairs: set[Pair],
    accepted: set[Pair],
) -> Iterator[dict[str, Any]]:
    """Measures in the order of need: what `auto` would take everywhere, then all the rest.

    Args:
        requests: from `usual_requests`.
        dtype: that LLaMAs have there.
        budget: is asked in front of each measurement.
        open_pairs: backends and numbers of requests that have no answer.
        accepted: those that have one, and accept.

    Yields:
        What is measured, and its answer.
    """
    from padless.selection import BACKENDS, adapter

    needed = {REQUESTS.index(usual) for usual in most_needed(dtype)}
    open_pairs, accepted = set(open_pairs), set(accepted)
    for only_until_one_accepts in (True, False):
        for number in in_order_of_need(dtype):
            is_needed = only_until_one_accepts and number in needed
            may_measure = functools.partial(_may_measure, budget, is_needed)
            for name in BACKENDS:
                pair, request = (name, number), requests[number]
                if pair in open_pairs and may_measure(adapter(name), request):
                    yield {"measuring": [*pair], "needed": is_needed}
                    budget.start(is_needed)
                    found = _ask_one(name, request, may_measure)
                    budget.stop()
                    if found is not None:
                        open_pairs.remove(pair)
                        if found["rejected"] is None:
                            accepted.add(pair)
                        yield {"asked": [*pair], **found}
                if only_until_one_accepts and pair in accepted:
                    break


def _may_measure(
    budget: Budget, needed: bool, backend: ModuleType, request: AttentionRequest
) -> bool:
    from padless.qualification import expected_ms

    return budget.allows(needed, expected_ms(backend, request) / 1e3)


def usual_requests(device: torch.device) -> list[AttentionRequest]:
    """Makes the requests of usual LLaMAs, in the order of `REQUESTS`."""
    import torch

    from padless.backends.request import AttentionRequest

    made = []
    for shape, dtype, training in REQUESTS:
        heads, kv_heads, head_dim = USUAL_SHAPES[shape]
        kind = getattr(torch, dtype)
        made.append(
            AttentionRequest(
                device, kind, head_dim, heads, kv_heads, causal=True, needs_grad=training
            )
        )
    return made


def _ask_one(
    name: str,
    request: AttentionRequest,
    may_measure: Callable[[ModuleType, AttentionRequest], bool],
) -> dict[str, Any] | None:
    """Asks one backend as `auto` would: by what it takes, then by its numbers; None if unknown."""
    from padless.answers import UNMEASURED
    from padless.selection import ask_backend

    found = ask_backend(name, request, may_measure)
    if found.rejected == UNMEASURED:
        return None
    return {"rejected": found.rejected, "head_dim": found.head_dim}


_QUESTIONS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "import": _import,
    "torch": _torch,
    "triton": _triton,
    "backends": _backends,
}
