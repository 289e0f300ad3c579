"""Batched generation through `model.generate` from left-padded prompts: padless and its peers."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.generation_timing import Turn, measure_generation
from benchmarks.generation_variants import Builder, Generation, Truth
from benchmarks.prompts import make_prompts, new_widths
from benchmarks.record import Record, parser
from padless.benchmark.batches import draw_lengths
from padless.benchmark.models import LLAMA_8B_WIDTH, SMOKE
from padless.benchmark.variant import WrongNumbersError


class Case(NamedTuple):
    """A batch to generate for.

    Attributes:
        key: for the command line.
        rows: of the batch.
        seqlen: slots of the longest prompt.
        is_new: whether each turn and each variant has a width of its own.
        by_default: whether a run takes it if it is not asked for.
    """

    key: str
    rows: int
    seqlen: int
    is_new: bool
    by_default: bool = True


# Lengths of keys around 128 are soon all met: those have one shape.
CASES = (
    Case("p7", 16, 1024, True),
    Case("p7-fixed", 16, 1024, False),
    Case("1x128", 1, 128, False),
    Case("16x128", 16, 128, False),
    Case("64x128", 64, 128, False),
    Case("1x1024", 1, 1024, True),
    Case("64x1024", 64, 1024, True),
    Case("1x8192", 1, 8192, True),
    Case("16x8192", 16, 8192, True),
    Case("64x8192", 64, 8192, True, by_default=False),
)
_SMOKE_CASES = (Case("p7", 4, 128, True), Case("p7-fixed", 4, 32, False))
_SHARE = 0.45
_LAYERS = 8
# Of first tokens, as transformers' default has them, or as good: in bfloat16 ties fall either way.
_SAME_AT_LEAST = 0.5
_COMPARED_TOKENS = 8


def main() -> None:
    """Measures every case and writes the record."""
    options = parser(__doc__, seconds=180)
    keys = ", ".join(case.key for case in CASES)
    options.add_argument("--cases", help=f"some of {keys}; by commas; all but 64x8192 if not given")
    options.add_argument("--tokens", type=int, help="behind the first one; 64 if not given")
    options.add_argument("--layers", type=int, help=f"instead of the model's {_LAYERS}")
    options.add_argument("--compile", action="store_true", help="a compiled static cache too")
    options.add_argument("--without", help="texts; rows with one of them are left out; by commas")
    arguments = options.parse_args()
    record = Record("generation", arguments)
    arguments.tokens = arguments.tokens or (4 if record.smoke else 64)
    cases = _cases(_SMOKE_CASES if record.smoke else CASES, arguments.cases)
    shape = SMOKE if record.smoke else dataclasses.replace(LLAMA_8B_WIDTH, num_layers=_LAYERS)
    if arguments.layers:
        shape = dataclasses.replace(shape, num_layers=arguments.layers)
    dtype = torch.bfloat16 if record.clock.is_cuda else torch.float32
    longest = max(case.seqlen for case in cases) + arguments.tokens + 1
    _quieten()
    generation = Generation(shape, dtype, arguments.device, longest)
    for case in cases:
        _measure_case(record, generation, case, arguments, arguments.seconds / len(cases))


def _cases(cases: tuple[Case, ...], wanted: str | None) -> list[Case]:
    if wanted is None:
        return [case for case in cases if case.by_default]
    keys = wanted.split(",")
    unknown = sorted(set(keys) - {case.key for case in cases})
    if unknown:
        raise SystemExit(f"no such cases: {', '.join(unknown)}")
    return [case for case in cases if case.key in keys]


def _measure_case(
    record: Record,
    generation: Generation,
    case: Case,
    arguments: argparse.Namespace,
    seconds: float,
) -> None:
    tokens = arguments.tokens
    builders = _without(
        generation.builders(case.rows, case.seqlen, tokens + 1, with_compile=arguments.compile),
        arguments.without,
    )
    turns = Turns(case, tokens, len(builders), generation, arguments.seed)
    prompts = turns.draw(0)[1]
    truth = generation.find_truth(prompts, tokens + 1)
    timings = measure_generation(
        builders,
        record.clock,
        draw=turns.draw,
        tokens=tokens,
        check=make_check(
            truth,
            (case.rows, tokens + 1),
            at_least=1.0 if generation.model.dtype == torch.float32 else _SAME_AT_LEAST,
        ),
        seconds=seconds,
        weight_bytes=generation.weight_bytes,
        own_columns=case.is_new,
        warmup=turns.warmup,
        max_rounds=turns.max_rounds,
        seed=arguments.seed,
    )
    share = 1.0 if case.rows == 1 else _SHARE
    percent = "all" if share == 1.0 else f"{100 * share:.0f} %"
    last = case.rows * tokens
    facts: dict[str, Any] = {"lengths_a_turn": [drawn[1].lengths for drawn in turns.drawn]}
    if not case.is_new:
        facts = {"lengths": prompts.lengths, "tokens_padded": case.rows * case.seqlen}
        facts["tokens_real"] = sum(prompts.lengths)
    record.add(
        f"{case.rows} x {case.seqlen}, {percent} real"
        + (", new lengths at every turn" if case.is_new else ""),
        timings,
        key=case.key,
        new_lengths=case.is_new,
        share=share,
        tokens=tokens,
        dtype=str(generation.model.dtype).removeprefix("torch."),
        model=generation.shape.as_facts(),
        seqlens=[drawn[1].seqlen for drawn in turns.drawn],
        weight_bytes=generation.weight_bytes,
        decode_floor_ms=generation.read_bytes / record.ceilings.copy_tb_s / 1e9,
        cache_bytes_real=generation.cache_bytes(sum(prompts.lengths) + last),
        cache_bytes_padded=generation.cache_bytes(case.rows * prompts.seqlen + last),
        **facts,
    )


class Turns:
    """Draws the prompts of every turn, once each.

    Args:
        case: says how many and how long.
        tokens: that are generated behind the first one.
        variants: how many take part.
        generation: whose vocabulary and device it is.
        seed: of lengths and tokens.
    """

    def __init__(
        self, case: Case, tokens: int, variants: int, generation: Generation, seed: int
    ) -> None:
        self._case = case
        self._generation = generation
        self._rng = random.Random(seed)
        self.drawn: list[Turn] = []
        self.widths = [case.seqlen]
        if case.is_new:
            self.widths = new_widths(case.seqlen, tokens, variants, self._rng)
        # With one shape the second turn finds what the first one left, such as a larger cache.
        self.warmup = 1 if case.is_new else 2
        self.max_rounds = max(1, len(self.widths) - 1) if case.is_new else 10

    def draw(self, index: int) -> Turn:
        """Makes the prompts of a turn's number: those for one token, and those for more."""
        case = self._case
        if not case.is_new:
            index = 0
        while len(self.drawn) <= index:
            slots = self.widths[len(self.drawn) % len(self.widths)]
            share = 1.0 if case.rows == 1 else _SHARE
            lengths = draw_lengths(case.rows, slots, share, self._rng)
            vocab_size, device = self._generation.shape.vocab_size, self._generation.device
            prompts = make_prompts(lengths, slots, vocab_size, self._rng, device)
            self.drawn.append((prompts.narrowed() if case.is_new else prompts, prompts))
        return self.drawn[index]


def make_check(
    truth: Truth | None, shape: tuple[int, int], *, at_least: float
) -> Callable[[Tensor], dict[str, Any]]:
    """Makes what compares tokens with those of transformers' default.

    Args:
        truth: tokens of a shape as below; None if it is not known.
        shape: rows, and tokens of each.
        at_least: share of the rows whose first token has to be the same, or one that scores as
            high; 1: so have all tokens to be the same.
    """

    def check(found: Tensor) -> dict[str, Any]:
        if found.shape != shape:
            raise WrongNumbersError(f"{tuple(found.shape)} tokens instead of {shape}")
        if truth is None:
            return {}
        same = found.cpu() == truth.tokens
        tied = truth.ties.gather(1, found[:, :1].cpu())[:, 0]
        first = float((same[:, 0] | tied).double().mean())
        few = float(same[:, :_COMPARED_TOKENS].double().mean())
        if first < at_least:
            raise WrongNumbersError(f"{100 * first:.0f} % of first tokens as transformers' default")
        if at_least == 1.0 and not bool(same.all()):
            wrong = int((~same).sum())
            raise WrongNumbersError(
                f"{wrong} of {same.numel()} tokens not as transformers' default"
            )
        return {"same_first_tokens": first, "same_early_tokens": few}

    return check


def _without(builders: dict[str, Builder], texts: str | None) -> dict[str, Builder]:
    unwanted = texts.split(",") if texts else []
    return {
        name: build
        for name, build in builders.items()
        if not any(text in name for text in unwanted)
    }


def _quieten() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
