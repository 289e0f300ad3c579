"""Ring attention: keys and values travel from rank to rank, and queries stay.

Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023; the zigzag split is that of
zhuzilin/ring-flash-attention. Backward calls the kernels' own backward for each block, with out and
the logarithms of the sums of all keys: the block's weights are then exactly those of the whole, and
its gradients its share of theirs. Going back through the merge instead would keep every block's
output. Backends without such a backward are passed over.

Whatever travels has a block to be computed beside it. Backward goes round the other way: it begins
with the keys that came last, which are still here, and ends with this rank's own, beside which the
last sums come home. To begin with its own would leave that return with nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from padless.dispatch import no_autocast
from padless.kernels.merge import merge_rows
from padless.parallel.group import SequenceGroup
from padless.parallel.ring_plan import Block, RingPlan, Rows

Pair = tuple[Tensor, Tensor]


def attend_in_ring(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, group: SequenceGroup) -> Tensor:
    """Attends over the tokens of all ranks.

    Args:
        q: `(own, num_heads, head_dim)`, this rank's tokens in the order of the plan's split.
        k: `(own, num_kv_heads, head_dim)`.
        v: shape of k.
        plan: of this rank.
        group: who takes part.

    Returns:
        `(own, num_heads, head_dim)`.
    """
    with no_autocast(q):
        out: Tensor = _Ring.apply(q, k, v, plan, group)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, group: SequenceGroup
    ) -> Tensor:
        ring = _Neighbours(group, plan.shared, 1)
        shared = plan.shared[group.rank]
        travelling = k[:shared], v[:shared]
        arriving = ring.start(travelling, 1) if group.size > 1 else None
        out, lse = plan.local.attend(q, k, v)
        # Behind them are documents that no other rank has a part of.
        own = out.narrow(0, 0, shared)
        merged = own.to(lse.dtype) if plan.keeps_exact else own
        for step in range(1, group.size):
            travelling = ring.finish(arriving)
            arriving = ring.start(travelling, step + 1) if step + 1 < group.size else None
            for block in plan.blocks[step]:
                part, part_lse = block.attend(block.queries.of(q), *block.keys.of_both(travelling))
                merge_rows(merged, lse, part, part_lse, block.queries.place)
        if merged is not own:
            own.copy_(merged)
        ctx.plan, ctx.group = plan, group
        # The keys that came last: where backward begins.
        kept = travelling if group.size > 1 else (None, None)
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *travelling = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        group: SequenceGroup = ctx.group
        ring, exact = _Neighbours(group, plan.shared, -1), lse.dtype
        shared, dout = plan.shared[group.rank], dout.contiguous()
        # In float32 where more than two are added: two are, and rounded once, by adding them. What
        # comes home on two ranks is the gradient of one block, and is added to that of another.
        sent = exact if group.size > 2 else k.dtype
        remote_dq: Tensor | None = None
        remote = Rows(slice(0, shared), None)
        arriving: Any = None
        returning: Any = None
        with no_autocast(q):
            for step in reversed(range(1, group.size)):
                if arriving is not None:
                    travelling = ring.finish(arriving)
                arriving = ring.start(travelling, step - 1) if step > 1 else None
                found = [
                    (block, _gradients(block, (dout, q, out), lse, travelling))
                    for block in plan.blocks[step]
                ]
                # What the ranks before have added up for keys that are here now.
                sums: Any = (None, None) if returning is None else ring.finish(returning)
                for block, (dq_b, *both) in found:
                    if plan.keeps_exact:
                        remote_dq = block.queries.add(remote_dq, dq_b, shared, exact)
                    else:
                        # The only block.
                        remote_dq, remote = dq_b, block.queries
                    sums = tuple(
                        block.keys.add(total, each, len(travelling[0]), sent)
                        for total, each in zip(sums, both, strict=True)
                    )
                if sums[0] is None:
                    sums = tuple(torch.zeros_like(x, dtype=sent) for x in travelling)
                returning = ring.start(sums, step - 1)
            dq, dk, dv = plan.local.gradients(dout, q, k, v, out, lse)
            if remote_dq is not None:
                remote.add(dq, remote_dq, len(dq), dq.dtype)
            if returning is not None:
                for own, home in zip((dk, dv), ring.finish(returning), strict=True):
                    own.narrow(0, 0, shared).add_(home)
        return dq, dk, dv, None, None


def _gradients(block: Block, own: tuple[Tensor, ...], lse: Tensor, travelling: Pair) -> Any:
    """Goes back through a block: own are dout, q and out of all this rank's tokens."""
    dout, q, out = (block.queries.of(x) for x in own)
    row_lse = block.queries.of(lse, dim=1).contiguous()
    return block.gradients(dout, q, *block.keys.of_both(travelling), out, row_lse)


class _Neighbours:
    """Sends to the next rank of the ring while the one in front sends here.

    Args:
        group: the ranks.
        shared: of each rank, how many of its tokens travel.
        way: 1 to send to the rank behind, -1 to the one in front.
    """

    def __init__(self, group: SequenceGroup, shared: tuple[int, ...], way: int) -> None:
        self.group, self.shared, self.way = group, shared, way

    def start(self, sent: Sequence[Tensor], step: int) -> Any:
        """Begins to send; what will arrive is of the rank `step` places in front of this one."""
        sent = [x.contiguous() for x in sent]
        tokens = self.shared[(self.group.rank - step) % self.group.size]
        received = tuple(x.new_empty(tokens, *x.shape[1:]) for x in sent)
        peers = self.group.neighbour(self.way), self.group.neighbour(-self.way)
        # Nothing is sent where there is nothing to send: both sides know.
        operations = [
            dist.P2POp(way, x, peer, self.group.process_group)
            for way, each, peer in zip(
                (dist.isend, dist.irecv), (sent, received), peers, strict=True
            )
            for x in each
            if x.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return works, sent, received

    def finish(self, started: Any) -> Any:
        """Waits for what has been begun; what was sent is kept until then."""
        works, _, received = started
        for work in works:
            work.wait()
        return received
