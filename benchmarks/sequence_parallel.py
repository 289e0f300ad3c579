"""Attention over a sequence that GPUs share, against one GPU: time, memory, exactness.

Start it with `torchrun --nproc-per-node 2 -m benchmarks.sequence_parallel`. Every rank is timed by
itself; a turn takes as long as its slowest rank. Efficiency is one GPU's time over the ranks' time
times their number.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import names
from benchmarks.record import Record, parser
from benchmarks.sequence_peers import Peer, peers
from benchmarks.timeline import record_timeline
from padless import VarlenLayout
from padless.benchmark.clock import Clock
from padless.benchmark.models import attention_flops
from padless.benchmark.reasons import free_memory, give_up
from padless.benchmark.variant import Timing, WrongNumbersError

_TOKENS = (32768, 65536, 131072)
_HEADS = (32, 8, 128)
_MEAN_DOCUMENT = 2048
# Relative to what one GPU computes: two bfloat16 kernels differ by thousandths.
_TOLERANCE = {"cuda": 0.02, "cpu": 1e-5}


def main() -> None:
    """Measures every length and writes the record, on the first rank."""
    options = parser(__doc__, seconds=120)
    options.add_argument("--trace", action="store_true", help="a timeline of the shortest batches")
    arguments = options.parse_args()
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    kind = "cuda" if on_gpu else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    record = Record("sequence_parallel", arguments) if dist.get_rank() == 0 else None
    clock = record.clock if record else Clock(kind)
    tokens, heads = (_TOKENS, _HEADS) if not arguments.smoke else ((64, 128), (4, 2, 16))
    rng = random.Random(arguments.seed)
    for total in tokens:
        for lengths in ([total], _documents(total, rng)):
            run = _Run(lengths, heads, mesh, clock, arguments.seed)
            timings = run.measure(arguments.seconds / len(tokens) / 2)
            if arguments.trace and total == tokens[0]:
                run.trace(timings)
            if record:
                _add(record, lengths, heads, timings, run.dtype)
    # A rank that leaves closes sockets that others may still read.
    dist.barrier()
    dist.destroy_process_group()


def _documents(total: int, rng: random.Random) -> list[int]:
    mean = min(_MEAN_DOCUMENT, total // 4)
    lengths: list[int] = []
    while (rest := total - sum(lengths)) > 0:
        lengths.append(min(rest, rng.randint(max(1, mean // 8), 2 * mean)))
    return lengths


def _add(
    record: Record,
    lengths: Sequence[int],
    heads: tuple[int, int, int],
    timings: list[Timing],
    dtype: torch.dtype,
) -> None:
    total, (num_heads, num_kv_heads, head_dim) = sum(lengths), heads
    size = dist.get_world_size()
    alone = _median(timings[0])
    for timing in timings[1:]:
        if alone and (ours := _median(timing)):
            timing.facts["efficiency"] = alone / (size * ours)
    kind = "one sequence" if len(lengths) == 1 else "packed documents"
    record.add(
        f"{total} tokens, {kind}, {size} ranks",
        timings,
        flops=attention_flops(num_heads, head_dim, lengths),
        tokens_real=total,
        tokens_padded=total,
        kind=kind,
        ranks=size,
        lengths=list(lengths),
        dtype=str(dtype).removeprefix("torch."),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def _median(timing: Timing) -> float | None:
    samples = timing.samples.get("forward_backward")
    return statistics.median(samples) if timing.reason is None and samples else None


class _Run:
    """One batch, in every way that it can be attended in."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: tuple[int, int, int],
        mesh: Any,
        clock: Clock,
        seed: int,
    ) -> None:
        self.clock = clock
        self.device = "cuda" if clock.is_cuda else "cpu"
        self.dtype = torch.bfloat16 if clock.is_cuda else torch.float32
        self.seed = seed
        self.peers = peers(VarlenLayout.from_lengths(lengths, device=self.device), mesh)
        num_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator(self.device).manual_seed(seed)
        # q, k, v and dout, the same on every rank.
        self.whole = [
            torch.randn(
                sum(lengths), n, head_dim, generator=generator, device=self.device, dtype=self.dtype
            )
            for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        ]
        self.expected: list[Tensor] = []

    def measure(self, seconds: float) -> list[Timing]:
        """Checks each way once, and times them by turns."""
        timings = {name: Timing(name) for name in self.peers}
        parts = {}
        for name, peer in self.peers.items():
            try:
                parts[name] = [peer.take(x).detach() for x in self.whole]
                timings[name].facts.update(self._check(name, peer, parts[name]))
                self._turn(peer, parts[name])
            except Exception as error:
                give_up(timings[name], error)
                free_memory()
            self._agree(timings[name])
        self.expected.clear()
        order = random.Random(self.seed)
        begin, rounds = time.perf_counter(), 0
        while rounds < 3 or (self._everywhere(time.perf_counter() - begin) < seconds):
            going = [name for name, timing in timings.items() if timing.reason is None]
            for name in order.sample(going, len(going)):
                elapsed, peak = self._turn(self.peers[name], parts[name])
                timings[name].samples.setdefault("forward_backward", []).append(elapsed)
                if peak is not None:
                    timings[name].peak_bytes = max(peak, timings[name].peak_bytes or 0)
            rounds += 1
        return list(timings.values())

    def trace(self, timings: list[Timing]) -> None:
        """Notes for each way but one GPU's what this rank's kernels did in one more turn."""
        for timing in timings:
            peer = self.peers[timing.name]
            if peer.is_alone or timing.reason is not None:
                continue
            parts = [peer.take(x).detach() for x in self.whole]
            with peer.context():
                dist.barrier()
                turn = functools.partial(self._compute, peer, parts)
                found = record_timeline(turn, self.clock.lead)
            if found is not None:
                timing.facts["timeline"] = found.as_facts()

    def _check(self, name: str, peer: Peer, parts: list[Tensor]) -> dict[str, Any]:
        """Compares with one GPU, which is the first to be asked."""
        with peer.context():
            found = self._compute(peer, parts)
        found = [peer.gather(x) for x in found]
        if name == names.ONE_GPU:
            self.expected = found
            return {}
        errors = {
            each: float((got.float() - want.float()).norm() / want.float().norm())
            for each, got, want in zip(("out", "dq", "dk", "dv"), found, self.expected, strict=True)
        }
        worst = max(errors.values())
        if not worst <= _TOLERANCE[self.device]:
            raise WrongNumbersError(f"off by {worst:.2g} of what one GPU computes")
        return {"relative_rms": errors}

    def _compute(self, peer: Peer, parts: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in parts[:3]]
        out = peer.attend(*leaves)
        out.backward(parts[3])
        gradients = [x.grad for x in leaves if x.grad is not None]
        return [out.detach(), *gradients]

    def _turn(self, peer: Peer, parts: list[Tensor]) -> tuple[float, int | None]:
        """Computes once: milliseconds and peak bytes of the slowest and the fullest rank."""
        with peer.context():
            self.clock.settle()
            dist.barrier()
            self.clock.forget_peak()
            self.clock.lead()
            start = self.clock.mark()
            if not peer.is_alone or dist.get_rank() == 0:
                self._compute(peer, parts)
            end = self.clock.mark()
        self.clock.settle()
        peak = self.clock.peak_bytes()
        elapsed = self._everywhere(self.clock.elapsed_ms(start, end))
        return elapsed, None if peak is None else int(self._everywhere(peak))

    def _everywhere(self, number: float) -> float:
        """Finds the largest number of all ranks."""
        found = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def _agree(self, timing: Timing) -> None:
        """Leaves out on every rank what failed on one."""
        if self._everywhere(float(timing.reason is not None)) and timing.reason is None:
            timing.reason = "failed on another rank"


if __name__ == "__main__":
    main()
