"""Collectives that autograd goes through: heads against tokens, tokens gathered, numbers added.

Each has the gradient of the sum of all ranks' losses, which is what DDP and FSDP average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from padless.parallel.group import SequenceGroup


@dataclass(eq=False)
class Exchange:
    """Tokens against heads among the ranks of a group, by one all-to-all each way.

    Issuing and waiting are two steps of the graph, so that what is computed in between, forward or
    backward, goes on while data travels.

    Attributes:
        group: who takes part.
        totals: tokens of each rank.
    """

    group: SequenceGroup
    totals: tuple[int, ...]

    @property
    def own(self) -> int:
        """Tokens of this rank."""
        return self.totals[self.group.rank]

    def to_heads(self, blocks: Tensor) -> Pending:
        """Sends each rank its heads of this rank's tokens.

        Args:
            blocks: `(size, own, heads, head_dim)`, contiguous; block r is for rank r.

        Returns:
            What gives `(total, heads, head_dim)`: all tokens in the order of the ranks.
        """
        pending = Pending()
        issued = _Issue.apply(blocks, self, True, pending)
        return pending.with_issued(issued, self, True)

    def to_tokens(self, rows: Tensor) -> Pending:
        """Sends each rank its tokens of this rank's heads.

        Args:
            rows: `(total, heads, head_dim)`.

        Returns:
            What gives `(size, own, heads, head_dim)`; block r is of rank r's heads.
        """
        pending = Pending()
        issued = _Issue.apply(rows, self, False, pending)
        return pending.with_issued(issued, self, False)

    def start(self, sent: Tensor, to_heads: bool) -> tuple[Tensor, Any]:
        """Issues one exchange; gives the buffer and what to wait for."""
        tail = sent.shape[-2:]
        size, width = self.group.size, tail.numel()
        equal = [self.own * width] * size
        uneven = [total * width for total in self.totals]
        shape = (sum(self.totals), *tail) if to_heads else (size, self.own, *tail)
        sent = sent.contiguous()
        received = sent.new_empty(shape)
        work = dist.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            uneven if to_heads else equal,
            equal if to_heads else uneven,
            group=self.group.process_group,
            async_op=True,
        )
        # What is sent has to stay alive until it has left.
        return received, (work, sent)


class Pending:
    """Data on its way; `wait()` gives it."""

    def __init__(self) -> None:
        self.work: Any = None
        self.back: Any = None

    def with_issued(self, issued: Tensor, exchange: Exchange, to_heads: bool) -> Pending:
        """Keeps what the wait needs."""
        self._arguments = (issued, exchange, to_heads, self)
        return self

    def wait(self) -> Tensor:
        """Gives what has arrived."""
        out: Tensor = _Wait.apply(*self._arguments)
        del self._arguments
        return out


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: Tensor, exchange: Exchange, to_heads: bool, pending: Pending
    ) -> Tensor:
        ctx.pending = pending
        received, pending.work = exchange.start(sent, to_heads)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Of the shape of what was received: it only led here. What came back is in pending.
        received, (work, _) = ctx.pending.back
        ctx.pending.back = None
        work.wait()
        return received, None, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, issued: Tensor, exchange: Exchange, to_heads: bool, pending: Pending
    ) -> Tensor:
        ctx.exchange, ctx.to_heads, ctx.pending = exchange, to_heads, pending
        work, _ = pending.work
        work.wait()
        pending.work = None
        return issued.view_as(issued)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.pending.back = ctx.exchange.start(grad, not ctx.to_heads)
        return grad, None, None, None


def gather_tokens(local: Tensor, totals: tuple[int, ...], group: SequenceGroup) -> Tensor:
    """Collects the tokens of all ranks, in the order of the ranks.

    Args:
        local: `(own, ...)`, the tokens of this rank.
        totals: tokens of each rank.
        group: who takes part.

    Returns:
        `(total, ...)` on every rank. Its gradient is the sum of all ranks'.
    """
    out: Tensor = _Gather.apply(local, totals, group)
    return out


def add_up(local: Tensor, group: SequenceGroup) -> Tensor:
    """Adds a number of every rank.

    Returns:
        The sum, on every rank. Its gradient is the sum of all ranks'.
    """
    out: Tensor = _Sum.apply(local, group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, totals: tuple[int, ...], group: SequenceGroup) -> Tensor:
        ctx.totals, ctx.group = totals, group
        # All of one size: not every backend gathers uneven parts.
        most = max(totals)
        filled = local.new_zeros(most, *local.shape[1:])
        filled[: local.shape[0]] = local
        parts = [torch.empty_like(filled) for _ in totals]
        dist.all_gather(parts, filled, group=group.process_group)
        return torch.cat([part[:own] for part, own in zip(parts, totals, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A copy, since the gradient may be shared with other branches.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group.process_group)
        return grad.split(list(ctx.totals))[ctx.group.rank], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        out = local.clone()
        dist.all_reduce(out, group=group.process_group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group.process_group)
        return grad, None
