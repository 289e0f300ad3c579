"""Batched `model.generate`: left-padded prompts, milliseconds to the first token and a token."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks import names
from benchmarks.batches import draw_lengths
from benchmarks.models import SMOKE, Shape, build_llama, sharing_copy, trusted_sdpa
from benchmarks.record import Record, parser
from benchmarks.variant import Timing

# LLaMA-3-8B in all but its depth and its vocabulary; TARGETS measured eight layers.
_SHAPE = Shape(4096, 32, 8, 8, 14336, 32000)
# Rows, slots of the prompt, share of them that is real.
_CASES = ((16, 1024, 0.45), (1, 1024, 1.0), (64, 1024, 0.45), (16, 128, 0.45), (16, 8192, 0.45))
_NO_CUDNN = "transformers sdpa, cuDNN off"
_STATIC = "transformers sdpa, static cache, cuDNN off"

Builder = Callable[[Any], tuple[Any, dict[str, Any], AbstractContextManager[Any]]]


class _Steps:
    """A stopping criterion that never stops, and notes when it is asked: once a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def _stock(model: Any) -> tuple[Any, dict[str, Any], AbstractContextManager[Any]]:
    return sharing_copy(model), {}, contextlib.nullcontext()


def _no_cudnn(model: Any) -> tuple[Any, dict[str, Any], AbstractContextManager[Any]]:
    return sharing_copy(model), {}, trusted_sdpa()


def _static(model: Any) -> tuple[Any, dict[str, Any], AbstractContextManager[Any]]:
    return (
        sharing_copy(model),
        {"cache_implementation": "static", "disable_compile": True},
        trusted_sdpa(),
    )


def _fa4(model: Any) -> tuple[Any, dict[str, Any], AbstractContextManager[Any]]:
    return sharing_copy(model, "flash_attention_4"), {}, contextlib.nullcontext()


def _padless(backend: str) -> Builder:
    def build(model: Any) -> tuple[Any, dict[str, Any], AbstractContextManager[Any]]:
        import padless

        made = sharing_copy(model)
        padless.patch(made, backend=backend)
        return made, {}, contextlib.nullcontext()

    return build


_BUILDERS: dict[str, Builder] = {
    names.PADLESS: _padless("auto"),
    f"{names.PADLESS}, backend torch_varlen": _padless("torch_varlen"),
    f"{names.PADLESS}, backend fa4": _padless("fa4"),
    names.FA4: _fa4,
    _NO_CUDNN: _no_cudnn,
    _STATIC: _static,
    names.SDPA: _stock,
}


def main() -> None:
    """Measures each case and writes the record."""
    options = parser(__doc__, seconds=20)
    options.add_argument("--new-tokens", type=int, default=128, help="of each call")
    arguments = options.parse_args()
    record = Record("generation", arguments)
    is_cuda = arguments.device == "cuda"
    shape, cases = (SMOKE, ((3, 16, 0.5),)) if record.smoke else (_SHAPE, _CASES)
    new = 4 if record.smoke else arguments.new_tokens
    dtype = torch.bfloat16 if is_cuda else torch.float32
    longest = max(seqlen for _, seqlen, _ in cases) + new
    model = build_llama(shape, dtype=dtype, device=arguments.device, longest=longest).eval()
    model.generation_config.eos_token_id = None
    for rows, seqlen, share in cases:
        lengths = draw_lengths(rows, seqlen, share, random.Random(arguments.seed))
        prompt = _prompt(lengths, seqlen, shape.vocab_size, arguments.device)
        timings = [
            _measure(name, build, model, prompt, new, arguments.seconds / len(_BUILDERS))
            for name, build in _BUILDERS.items()
        ]
        record.add(
            f"{rows} x {seqlen}, {100 * share:.0f} % real",
            timings,
            tokens_real=sum(lengths),
            tokens_padded=rows * seqlen,
            new_tokens=new,
            dtype=str(dtype).removeprefix("torch."),
            weight_bytes=sum(w.numel() * w.element_size() for w in model.parameters()),
            model=shape.as_facts(),
        )


def _prompt(lengths: Sequence[int], seqlen: int, vocab_size: int, device: str) -> dict[str, Tensor]:
    real = torch.arange(seqlen) >= seqlen - torch.tensor(lengths)[:, None]
    ids = torch.randint(1, vocab_size, real.shape).masked_fill(~real, 0)
    return {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}


def _measure(
    name: str, build: Builder, model: Any, prompt: dict[str, Tensor], new: int, seconds: float
) -> Timing:
    """Times calls of one variant; the first one is not counted.

    Returns:
        Milliseconds to the first token ("prefill"), of a step as a rule ("step", the median of a
        call), and of a call's steps together over their number, captures included ("token").
    """
    timing = Timing(name)
    try:
        made, options, context = build(model)
        is_cuda = prompt["input_ids"].is_cuda
        begin = None
        with context, torch.no_grad():
            while begin is None or time.perf_counter() - begin < seconds or not timing.samples:
                steps = _Steps()
                if is_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                made.generate(
                    **prompt, max_new_tokens=new, do_sample=False, pad_token_id=0,
                    stopping_criteria=[steps], **options,
                )  # fmt: skip
                if begin is None:
                    begin = time.perf_counter()
                    continue
                gaps = [1e3 * (b - a) for a, b in zip(steps.times, steps.times[1:], strict=False)]
                found = {
                    "prefill": 1e3 * (steps.times[0] - start),
                    "step": statistics.median(gaps),
                    "token": statistics.fmean(gaps),
                }
                for key, value in found.items():
                    timing.samples.setdefault(key, []).append(value)
                if is_cuda:
                    timing.peak_bytes = torch.cuda.max_memory_allocated() - before
    except Exception as error:
        # A variant that is not to be had is a row with its reason.
        lines = str(error).strip().splitlines() or [""]
        timing.reason = f"{type(error).__name__}: {lines[0]}"
        timing.samples.clear()
    return timing


if __name__ == "__main__":
    main()
