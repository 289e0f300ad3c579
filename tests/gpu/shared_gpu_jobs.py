"""What each of two ranks, a GPU each, does for the test of shared sequences."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from padless import VarlenLayout, varlen_attention
from padless.parallel import gather_row, ring_attention, shard_tokens, ulysses_attention

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64


def compare(rank: int, size: int, store: str, lengths: list[int], answers: Any) -> None:
    """Tells how far either way is from one GPU: RMS, relative, of out, dq, dk and dv."""
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

        def errors(algorithm: str, attend: Any) -> list[float]:
            q, k, v, dout = (shard_tokens(x, layout, mesh, algorithm) for x in whole)
            own = [x.clone().requires_grad_() for x in (q, k, v)]
            # Again and again, as layers do: memory that was sent is handed out again.
            for _ in range(5):
                for x in own:
                    x.grad = None
                made = attend(*own, layout, mesh)
                made.backward(dout)
            parts = (made.detach(), *(x.grad for x in own))
            found = (gather_row(x, layout, mesh, algorithm) for x in parts)
            pairs = [(a.float(), b.float()) for a, b in zip(found, want, strict=True)]
            return [float((a - b).norm() / b.norm()) for a, b in pairs]

        split = functools.partial(ulysses_attention, chunks=2)
        answers.put(
            {
                "ring": errors("ring", ring_attention),
                "ulysses": errors("ulysses", ulysses_attention),
                "ulysses in two parts": errors("ulysses", split),
            }
        )
    finally:
        dist.destroy_process_group()
