"""What each of two ranks, a GPU each, does for the test of the ring by copies."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from padless import VarlenLayout, varlen_attention
from padless.parallel import gather_row, ring_attention, shard_tokens
from padless.parallel.group import SequenceGroup
from padless.parallel.peers import copies_of, copying

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def _rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def compare(rank: int, size: int, store: str, lengths: list[int], answers: Any) -> None:
    """Tells how far a ring that copies, and one that sends, are from one GPU; RMS, relative."""
    # Where copies cannot be had, padless tells why.
    logging.basicConfig(level=logging.INFO)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cuda", (size,))
        layout = VarlenLayout.from_lengths(lengths, device="cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        whole = [
            torch.randn(
                sum(lengths), n, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16
            )
            for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        ]
        leaves = [x.clone().requires_grad_() for x in whole[:3]]
        out = varlen_attention(*leaves, layout)
        out.backward(whole[3])
        want = [out.detach(), *(x.grad for x in leaves)]

        def errors() -> list[float]:
            q, k, v, dout = (shard_tokens(x, layout, mesh, "ring") for x in whole)
            own = [x.clone().requires_grad_() for x in (q, k, v)]
            # Again and again, as layers do: what was shown is written over.
            for _ in range(5):
                for x in own:
                    x.grad = None
                made = ring_attention(*own, layout, mesh)
                made.backward(dout)
            parts = (made.detach(), *(x.grad for x in own))
            found = (gather_row(x, layout, mesh, "ring") for x in parts)
            return [_rms(a - b) / _rms(b) for a, b in zip(found, want, strict=True)]

        with copying():
            copied = errors()
            is_copied = copies_of(SequenceGroup.of(mesh), torch.device("cuda", rank)) is not None
        sent = errors()
        answers.put((rank, is_copied, copied, sent))
    finally:
        dist.destroy_process_group()
