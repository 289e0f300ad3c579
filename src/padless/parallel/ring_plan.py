"""What one rank does in each step of the ring: made once a batch, for all its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from padless import dispatch
from padless.backends.request import AttentionRequest
from padless.errors import BackendUnavailableError
from padless.layout import VarlenLayout
from padless.parallel.blocks import Range, local_lengths, visible_blocks
from padless.parallel.split import SequenceSplit


@dataclass(frozen=True)
class Options:
    """What a call asks for beside the data.

    Attributes:
        causal: whether queries see no later keys.
        softmax_scale: factor of the scores.
        deterministic: whether gradients repeat.
        backend: of `varlen_attention`, or "auto".
        needs_grad: whether there will be a backward.
    """

    causal: bool
    softmax_scale: float
    deterministic: bool
    backend: str
    needs_grad: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor, in order: a stretch of it where they are neighbours."""

    stretch: slice | None
    index: Tensor | None

    @classmethod
    def of_ranges(cls, ranges: Sequence[Range], device: torch.device) -> Rows:
        """Joins ranges that ascend."""
        if all(a[1] == b[0] for a, b in pairwise(ranges)):
            return cls(slice(ranges[0][0], ranges[-1][1]), None)
        found = [torch.arange(start, stop) for start, stop in ranges]
        return cls(None, torch.cat(found).to(device, non_blocking=True))

    @property
    def place(self) -> slice | Tensor:
        """What they are picked by."""
        return self.stretch if self.stretch is not None else self.index  # type: ignore[return-value]

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """Takes the rows: a view of a stretch, else a copy."""
        if self.index is not None:
            return x.index_select(dim, self.index)
        return x.narrow(dim, self.stretch.start, self.stretch.stop - self.stretch.start)  # type: ignore[union-attr]

    def of_both(self, pair: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Takes the rows of keys and of values."""
        return self.of(pair[0]), self.of(pair[1])

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Puts rows where `of` takes them, in the dtype of x."""
        if self.index is not None:
            x.index_copy_(0, self.index, rows.to(x.dtype))
        else:
            self.of(x).copy_(rows)

    def add(self, total: Tensor | None, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Adds to the rows of a total, in place.

        Args:
            total: None for zeros.
            rows: what to add; becomes the total if it is all of its rows, and the first.
            count: rows of the total.
            dtype: of the total.
        """
        if total is None:
            if self.index is None and rows.shape[0] == count:
                return rows.to(dtype)
            total = rows.new_empty(count, *rows.shape[1:], dtype=dtype)
            if self.stretch is None:
                total.zero_()
            else:
                # Zeros where nothing is put, and not under it.
                total[: self.stretch.start].zero_()
                total[self.stretch.stop :].zero_()
            self.put(total, rows)
        elif self.index is not None:
            total.index_add_(0, self.index, rows.to(total.dtype))
        else:
            self.of(total).add_(rows)
        return total


@dataclass(eq=False)
class Block:
    """One call of a kernel: some queries, the keys that they see, and how."""

    queries: Rows
    keys: Rows
    layout_q: VarlenLayout
    layout_k: VarlenLayout
    options: Options
    is_causal: bool
    _plans: dict[Any, dispatch.Plan] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attends: out in q's dtype, and lse in float32, or float64 from float64.

        Note:
            The caller may write to both, if it calls without gradients: nobody else has kept them.
        """
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        if not q.shape[0]:
            return torch.zeros_like(q), q.new_zeros(q.shape[1], 0, dtype=exact)
        out, lse = dispatch.run_with_lse(self.plan(q, k), q, k, v, self._asked())
        return out.contiguous(), lse.to(exact).contiguous()

    def gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """Gives dq, dk and dv: these keys' share of them, from a contiguous dout."""
        if not q.shape[0]:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        plan = self.plan(q, k)
        return dispatch.gradients(plan, (dout, q, k, v, out), lse, self._asked())

    def plan(self, q: Tensor, k: Tensor) -> dispatch.Plan:
        """Chooses the backend, once for all layers of a kind."""
        key = (q.device, q.dtype, q.shape[1:], k.shape[1])
        if key not in self._plans:
            request = AttentionRequest.of(
                q, k, causal=self.is_causal, deterministic=self.options.deterministic
            )
            # Inside of an autograd function no tensor tells.
            request = replace(request, needs_grad=self.options.needs_grad)
            self._plans[key] = dispatch.plan_call(
                request, self.options.backend, self.layout_q, self.layout_k, needs_lse=True
            )
        return self._plans[key]

    def _asked(self) -> dict[str, Any]:
        return {
            "causal": self.is_causal,
            "softmax_scale": self.options.softmax_scale,
            "window_size": (None, None),
            "deterministic": self.options.deterministic,
        }


def serves_ring(request: AttentionRequest, backend: str, tokens: int) -> bool:
    """Whether a backend other than the reference would compute the blocks of a ring.

    Args:
        request: what is asked, but for whether queries see later keys: a ring has blocks of both.
        backend: of `varlen_attention`, or "auto".
        tokens: of a rank.

    Note:
        May measure backends, as the ring itself would.
    """
    layout = VarlenLayout.from_lengths([tokens], device=request.device)
    for causal in (True, False):
        try:
            plan = dispatch.plan_call(
                replace(request, causal=causal), backend, layout, layout, needs_lse=True
            )
        except BackendUnavailableError:
            return False
        if plan.selection.name == "reference":
            return False
    return True


@dataclass(frozen=True, eq=False)
class RingPlan:
    """All that one rank does.

    Attributes:
        local: its own queries and keys.
        blocks: for each step, what its queries see of the keys that are there then; step i has
            those of the rank i places in front of it, and step 0 is `local`.
        shared: of each rank, how many of its tokens travel.
    """

    local: Block
    blocks: tuple[tuple[Block, ...], ...]
    shared: tuple[int, ...]

    @property
    def keeps_exact(self) -> bool:
        """Whether results are kept in float32 between steps.

        Where there are two parts, their sum is computed in float32 and rounded once by itself.
        """
        return sum(map(len, self.blocks)) > 1

    @classmethod
    def of(
        cls, split: SequenceSplit, rank: int, options: Options, device: torch.device
    ) -> RingPlan:
        """Makes the plan of a rank.

        Args:
            split: of the flat row, by `split_balanced`.
            rank: of the group.
            options: of the calls.
            device: of the tensors.
        """
        lengths = local_lengths(split, rank)
        own = VarlenLayout.from_lengths(lengths, device=device)
        everything = Rows(slice(0, own.total), None)
        local = Block(everything, everything, own, own, options, options.causal)
        steps: list[tuple[Block, ...]] = [()]
        for step in range(1, split.ranks):
            source = (rank - step) % split.ranks
            found = visible_blocks(split, rank, source, causal=options.causal)
            steps.append(tuple(_block(each.queries, each.keys, options, device) for each in found))
        shared = tuple(
            sum(piece.tokens for piece in split.shared(each)) for each in range(split.ranks)
        )
        return cls(local, tuple(steps), shared)


def _block(
    queries: Sequence[Range], keys: Sequence[Range], options: Options, device: torch.device
) -> Block:
    layouts = [
        VarlenLayout.from_lengths([stop - start for start, stop in ranges], device=device)
        for ranges in (queries, keys)
    ]
    rows = [Rows.of_ranges(ranges, device) for ranges in (queries, keys)]
    return Block(rows[0], rows[1], layouts[0], layouts[1], options, False)
