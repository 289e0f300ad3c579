"""`bench`: verifies the patch on a model, then times it beside what else there is, by turns."""

from __future__ import annotations

import datetime
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from padless.benchmark.batches import Batch, make_batch
from padless.benchmark.clock import Ceilings, Clock, measure_ceilings
from padless.benchmark.distributions import SHORTEST, LengthSource, check_lengths
from padless.benchmark.models import Shape
from padless.benchmark.names import PADLESS, UNPATCHED
from padless.benchmark.peers import DEFAULT_PEERS, LATE, builders, check_peers
from padless.benchmark.reasons import is_out_of_memory
from padless.benchmark.report import BenchReport
from padless.benchmark.summary import floor_ms, summarise
from padless.benchmark.timing import Progress, measure
from padless.benchmark.training_step import TrainingStep, widening
from padless.benchmark.variant import Timing
from padless.benchmark.verified import verified
from padless.environment import hardware, versions
from padless.errors import UnsupportedError
from padless.llama.engage import suspended
from padless.unpadded.engagement import set_aside
from padless.verification import Check
from padless.verification.measure import attention_layers, undisturbed, vocab_size

# Turns before the rounds: on a GPU kernels are compiled and plans are made in them.
_WARMUP = {"cuda": 3, "cpu": 2}
_MAX_ROUNDS = 1000
_DEFAULT_BATCH = 8
# The longest row where the caller names none.
_DEFAULT_SEQLEN = {"cuda": 2048, "cpu": 128}


def bench(
    model: nn.Module,
    *,
    batch: int = _DEFAULT_BATCH,
    seqlen: int | None = None,
    lengths: Sequence[int] | None = None,
    distribution: str = "uniform",
    fixed_lengths: bool = False,
    forward_only: bool = False,
    peers: Sequence[str] = DEFAULT_PEERS,
    verify_first: bool = True,
    seconds: float = 20.0,
    warmup_seconds: float = 60.0,
    seed: int = 0,
    name: str | None = None,
    on_progress: Progress | None = None,
    on_partial: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Times a training step of the caller's model: unpatched, patched and by its peers, by turns.

    First the patched model is verified on a small batch. Then each variant takes a step on the same
    padded batch in each round, in another order each time, with new lengths in every round. All
    variants share the model's weights; a variant that fails is a row with the reason.

    Args:
        model: a `LlamaForCausalLM`, on one device; given back as it was, patched or not.
        batch: rows of a step.
        seqlen: the longest that a row may be, in tokens; default the longest of `lengths`, or 2048
            on a GPU and 128 on a CPU. Each batch is padded to its longest row.
        lengths: the caller's own, in tokens: dealt out in random order, all before any comes again.
        distribution: of lengths otherwise: "uniform", "lognormal" or "full" (no padding).
        fixed_lengths: whether all steps have the first batch.
        forward_only: whether a step is the forward with its loss alone, in evaluation and without
            autograd.
        peers: of `padless.benchmark.PEERS`; the model's own attention is no peer of itself.
        verify_first: whether the numbers are verified before anything is timed.
        seconds: of timing in all; verifying and warming up are not in them.
        warmup_seconds: behind which a peer that is not warm yet is given up. A turn that runs is
            not cut off, so that a compiler may take longer: "compile" comes last for that.
        seed: of lengths, tokens and the order of turns.
        name: what to call the model in the report; default its class.
        on_progress: called with (stage, done, total).
        on_partial: given what was measured of the others by the time at which "compile" is begun,
            marked as interrupted.

    Returns:
        The report. If the verification failed it has no rows, and `report.passed` is False.
        KeyboardInterrupt ends the run early: `report.is_interrupted` is True then, and the rows
        have the steps that were done.

    Raises:
        TypeError: model is not a torch module.
        ValueError: an argument is out of its range, or nothing in the model learns.
        UnsupportedError: the model holds no LLaMA attention or is on several devices, or memory is
            too small to verify it.
        EngagementError: the patch does not take effect on this transformers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    attention_layers(model)
    device = _one_device(model)
    if seqlen is None and lengths is not None:
        check_lengths(lengths)
        seqlen = max(lengths)
    elif seqlen is None:
        seqlen = _DEFAULT_SEQLEN.get(device.type, _DEFAULT_SEQLEN["cpu"])
    _check_numbers(batch, seqlen, seconds, warmup_seconds)
    if not forward_only and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "model must have a weight that requires gradients to be trained, got none; "
            "give forward_only=True"
        )
    rng = random.Random(seed)
    source = LengthSource(seqlen, distribution=distribution, lengths=lengths, rng=rng)
    run = _Run(model, device, source, batch, seconds, seed, forward_only, fixed_lengths)
    run.peers = check_peers(peers)
    run.warmup_seconds = warmup_seconds
    started = time.perf_counter()
    tell = on_progress or (lambda *_: None)

    def report(is_interrupted: bool) -> BenchReport:
        rounds = run.rounds()
        floor = None
        if run.ceilings is not None and rounds:
            floor = floor_ms(run.shape, rounds, run.ceilings, forward_only=forward_only)
        return BenchReport(
            model=name or type(model).__name__,
            shape=run.shape.as_facts(),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            attention=run.attention,
            hardware=hardware(device),
            versions=versions(),
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            seed=seed,
            batch=batch,
            seqlen=seqlen,
            lengths_from="lengths" if lengths is not None else distribution,
            is_fixed=fixed_lengths,
            is_forward_only=forward_only,
            ceilings=None if run.ceilings is None else run.ceilings._asdict(),
            floor_ms=floor,
            checks=run.checks,
            rows=summarise(run.timings, rounds, floor),
            lengths_a_round=rounds,
            is_interrupted=is_interrupted,
            seconds=time.perf_counter() - started,
        )

    if on_partial is not None:
        run.before_late = lambda: on_partial(report(is_interrupted=True))
    is_interrupted = False
    try:
        with ExitStack() as entered:
            for context in (suspended(), set_aside(model), undisturbed(model)):
                entered.enter_context(context)
            if device.type == "cuda":
                entered.enter_context(torch.cuda.device(device))
            if verify_first:
                run.checks = verified(model, seqlen, seed, device, tell)
            if all(check.passed for check in run.checks):
                run.time(rng, tell)
    except KeyboardInterrupt:
        is_interrupted = True
    return report(is_interrupted)


class _Run:
    """One benchmark, and what it has found so far."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        source: LengthSource,
        rows: int,
        seconds: float,
        seed: int,
        forward_only: bool,
        fixed_lengths: bool,
    ) -> None:
        self.model, self.device, self.source = model, device, source
        self.rows, self.seconds, self.seed = rows, seconds, seed
        self.forward_only, self.fixed_lengths = forward_only, fixed_lengths
        self.shape = Shape.of_config(model.config)
        self.attention = getattr(model.config, "_attn_implementation", None) or "eager"
        self.peers: tuple[str, ...] = ()
        self.warmup_seconds = math.inf
        self.before_late: Callable[[], None] | None = None
        self.checks: tuple[Check, ...] = ()
        self.ceilings: Ceilings | None = None
        self.timings: list[Timing] = []
        self._drawn: list[tuple[int, ...]] = []
        self._warmup = _WARMUP.get(device.type, 3)

    def time(self, rng: random.Random, tell: Progress) -> None:
        """Times all variants; after an interrupt, `timings` has what was found."""
        tell("measuring what this machine can do at most", 0, 1)
        clock = Clock(self.device.type)
        self.ceilings = measure_ceilings(clock, dtype=next(self.model.parameters()).dtype)
        self.model.train(not self.forward_only)
        step = TrainingStep(self.model, forward_only=self.forward_only)
        vocab = vocab_size(self.model)

        kept: dict[int | None, Batch] = {}

        def draw(index: int) -> Batch:
            index = 0 if self.fixed_lengths else index
            if index not in kept:
                lengths = self.source.draw(self.rows)
                self._drawn.append(lengths)
                # The warm-up's are met again by the next variant; of the others one is enough.
                kept.pop(index - 1 if index > self._warmup else None, None)
                kept[index] = make_batch(lengths, max(lengths), vocab, rng, self.device)
            return kept[index]

        try:
            step.find_truth(draw(0))
        except Exception as error:
            # The row of the unpatched model will say so; the others are not held against it.
            if not is_out_of_memory(error):
                raise
        made, without = builders(
            step,
            self.peers,
            attention=self.attention,
            device=self.device,
            new_lengths=not self.fixed_lengths,
        )
        if self.device.type == "cuda" and not self.fixed_lengths:
            made = {name: widening(build, at) for at, (name, build) in enumerate(made.items())}
        try:
            measure(
                made,
                clock,
                draw=draw,
                seconds=self.seconds,
                warmup=self._warmup,
                max_rounds=_MAX_ROUNDS,
                seed=self.seed,
                sit_out_at_most=1,
                late=LATE,
                warmup_limits=dict.fromkeys(
                    made.keys() - {UNPATCHED, PADLESS}, self.warmup_seconds
                ),
                into=self.timings,
                on_progress=tell,
                before_late=self.before_late,
            )
        finally:
            self.timings += [Timing(name, reason) for name, reason in without.items()]

    def rounds(self) -> tuple[tuple[int, ...], ...]:
        """Returns the rows' lengths of each round that has a sample."""
        count = max((timing.rounds[-1] + 1 for timing in self.timings if timing.rounds), default=0)
        if self.fixed_lengths:
            return (self._drawn[0],) * count if count else ()
        return tuple(self._drawn[self._warmup : self._warmup + count])


def _one_device(model: nn.Module) -> torch.device:
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1 or (device := devices.pop()).type == "meta":
        raise UnsupportedError(
            f"model must be on one device to be timed, got {sorted(map(str, devices)) or 'meta'}"
        )
    return device


def _check_numbers(batch: int, seqlen: int, seconds: float, warmup_seconds: float) -> None:
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if seqlen < SHORTEST:
        raise ValueError(f"seqlen must be at least {SHORTEST} tokens, got {seqlen}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    if not warmup_seconds > 0:
        raise ValueError(f"warmup_seconds must be above 0, got {warmup_seconds}")
