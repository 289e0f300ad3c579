"""Ring attention: keys and values travel from rank to rank, and queries stay.

Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023; the zigzag split is that of
zhuzilin/ring-flash-attention. Backward calls the kernels' own backward for each block, with out and
the logarithms of the sums of all keys: the block's weights are then exactly those of the whole, and
its gradients its share of theirs. Going back through the merge instead would keep every block's
output. Backends without such a backward are passed over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from padless.dispatch import no_autocast
from padless.parallel.group import SequenceGroup
from padless.parallel.merge import merge_
from padless.parallel.ring_plan import RingPlan


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
        ring = _Neighbours(group)
        shared = plan.shared[group.rank]
        travelling = torch.stack([k[:shared], v[:shared]])
        arriving = _start_step(ring, travelling, plan, 1)
        out, lse = plan.local.attend(q, k, v)
        for step in range(1, group.size):
            travelling = ring.finish(arriving)
            arriving = _start_step(ring, travelling, plan, step + 1)
            for block in plan.blocks[step]:
                part, part_lse = block.attend(block.queries.of(q), *block.keys.of_both(travelling))
                rows, row_lse = block.queries.of(out), block.queries.of(lse, dim=1)
                merge_(rows, row_lse, part, part_lse)
                block.queries.put(out, rows)
                block.queries.put(lse, row_lse, dim=1)
        ctx.plan, ctx.group = plan, group
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        group: SequenceGroup = ctx.group
        ring, exact = _Neighbours(group), lse.dtype
        shared = plan.shared[group.rank]
        travelling = torch.stack([k[:shared], v[:shared]])
        with no_autocast(q):
            arriving = _start_step(ring, travelling, plan, 1)
            dq, dk, dv = (x.to(exact) for x in plan.local.gradients(dout, q, k, v, out, lse))
            # What the ranks before have added up for keys that are here now.
            sums: Any = None
            for step in range(1, group.size):
                travelling = ring.finish(arriving)
                arriving = _start_step(ring, travelling, plan, step + 1)
                grads = torch.zeros_like(travelling, dtype=exact)
                for block in plan.blocks[step]:
                    rows = (block.queries.of(x) for x in (dout, q, out, lse.transpose(0, 1)))
                    dout_b, q_b, out_b, lse_b = rows
                    dq_b, dk_b, dv_b = block.gradients(
                        dout_b,
                        q_b,
                        *block.keys.of_both(travelling),
                        out_b,
                        lse_b.transpose(0, 1).contiguous(),
                    )
                    block.queries.add(dq, dq_b)
                    for grad, each in ((grads[0], dk_b), (grads[1], dv_b)):
                        block.keys.add(grad, each)
                if sums is not None:
                    grads += ring.finish(sums)
                tokens = plan.shared[(group.rank - step - 1) % group.size]
                sums = ring.start(grads, (2, tokens, *k.shape[1:]))
            if sums is not None:
                home = ring.finish(sums)
                dk[:shared] += home[0]
                dv[:shared] += home[1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _start_step(ring: _Neighbours, travelling: Tensor, plan: RingPlan, step: int) -> Any:
    """Hands keys and values on, and begins to receive those of a step; nothing behind the last."""
    if step >= ring.group.size:
        return None
    tokens = plan.shared[(ring.group.rank - step) % ring.group.size]
    return ring.start(travelling, (2, tokens, *travelling.shape[2:]))


class _Neighbours:
    """Sends to the next rank of the ring while the one in front sends here."""

    def __init__(self, group: SequenceGroup) -> None:
        self.group = group

    def start(self, sent: Tensor, shape: tuple[int, ...]) -> Any:
        """Begins; the shape is that of what will arrive, which the plan knows."""
        sent, received = sent.contiguous(), sent.new_empty(shape)
        pair = (
            (dist.isend, sent, self.group.neighbour(1)),
            (dist.irecv, received, self.group.neighbour(-1)),
        )
        # Nothing is sent where there is nothing to send: both sides know.
        operations = [
            dist.P2POp(way, x, peer, self.group.process_group) for way, x, peer in pair if x.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return works, sent, received

    def finish(self, started: Any) -> Tensor:
        """Waits for what has been begun; what was sent is kept until then."""
        works, _, received = started
        for work in works:
            work.wait()
        return received
