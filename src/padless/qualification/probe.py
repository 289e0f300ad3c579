"""The inputs that show what an attention backend gets wrong. Their judgement is `judgement`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest, Window
from padless.layout import VarlenLayout
from padless.reference import visible_keys

# Raise it with every change of probes or budgets: older verdicts are then measured again.
PROBE_VERSION = 1

# Lengths of 0, 1, on both sides of the kernels' tiles (32 to 64 rows on the CPU, 64 to 128 on a
# GPU) and beyond two of them; keys beyond the CPU kernel's block of 512; more queries than keys, so
# that some see none; queries without a key and keys without a query.
_SQUARE = {"cpu": (1, 0, 33, 66), "gpu": (1, 0, 65, 129, 300)}
_CROSSED = {
    "cpu": ((20, 33), (0, 5), (40, 17), (5, 0), (1, 70), (3, 130)),
    "gpu": ((40, 167), (0, 3), (129, 64), (5, 0), (1, 300), (33, 1030)),
}
_DECODING = {
    "cpu": ((1, 1), (0, 9), (1, 33), (1, 520)),
    "gpu": ((1, 1), (0, 9), (1, 129), (1, 1030)),
}
# A window in a model is longer than a probe: at its own size it would cut nothing off.
_LARGEST_WINDOW = 50
# A power of two, so that nothing is rounded; sums of dout times v then stay within float16.
CODE_OF_DOUT = 1 / 16


@dataclass(frozen=True)
class Probe:
    """One packed batch.

    Attributes:
        name: kind of its inputs, for the reason of a failed verdict.
        q: `(total_q, num_heads, head_dim)`, in the dtype of the request like the others.
        k: `(total_k, num_kv_heads, head_dim)`.
        v: like k.
        dout: like q.
        layout_q: sequences of q.
        layout_k: sequences of k and v.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    layout_q: VarlenLayout
    layout_k: VarlenLayout


def probed_heads(request: AttentionRequest) -> tuple[int, int]:
    """Returns how many query and KV heads a probe has: the request's groups, about 32 heads."""
    groups = request.num_heads // request.num_kv_heads
    # Two KV heads show a wrong group. A GPU computes more of them for nothing, and its kernels
    # schedule by heads.
    most = 2 if request.device.type == "cpu" else max(2, 32 // groups)
    num_kv_heads = min(request.num_kv_heads, most)
    return groups * num_kv_heads, num_kv_heads


def probed_window(request: AttentionRequest) -> Window:
    """Returns the window of a probe: the request's, cut to what shows in a short sequence."""
    left, right = (None if n is None else min(n, _LARGEST_WINDOW) for n in request.window_size)
    return left, right


def visible_pairs(
    request: AttentionRequest, seqlen_q: int, seqlen_k: int, device: torch.device
) -> Tensor:
    """Returns which keys each query of one sequence sees, bool `(seqlen_q, seqlen_k)`."""
    return visible_keys(
        seqlen_q,
        seqlen_k,
        causal=request.causal,
        window_size=probed_window(request),
        device=device,
    )


def visible_counts(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout, device: torch.device
) -> Tensor:
    """Counts the keys that each query sees.

    Returns:
        float32 `(total_q, 1, 1)`.
    """
    counts = [
        visible_pairs(request, n, m, device).sum(1)
        for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True)
    ]
    return torch.cat(counts).float().view(-1, 1, 1)


def draw_gaussian(request: AttentionRequest, seed: int, *, decoding: bool = False) -> Probe:
    """Draws normal numbers by which each query attends to a few keys.

    Args:
        request: the family.
        seed: of the numbers.
        decoding: one query a sequence, which kernels have a path of its own for.
    """
    kind = _kind(request)
    pairs = _DECODING[kind] if decoding else [(n, n) for n in _SQUARE[kind]]
    drawn = _draw(request, seed, pairs)
    return Probe(
        "gaussian inputs at one query each" if decoding else "gaussian inputs",
        (2 * drawn.q).to(request.dtype),
        drawn.k.to(request.dtype),
        drawn.v.to(request.dtype),
        drawn.dout.to(request.dtype),
        drawn.layout_q,
        # One object for both where they are the same, as callers have it.
        drawn.layout_k if decoding else drawn.layout_q,
    )


def draw_outliers(request: AttentionRequest, seed: int) -> Probe:
    """Draws numbers spread as the activations of trained models are, in views of wider tensors.

    A few channels are 20 to 40 times as large as the others, k has a large mean, heads attend from
    flat to peaked, and the scores of the last head are all far from zero.
    """
    drawn = _draw(request, seed, _CROSSED[_kind(request)])
    q, k, v, dout = drawn[:4]
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    one, two, three, four = (i * head_dim // 4 for i in range(4))
    q *= torch.linspace(0.5, 4.5, num_heads, device=q.device).unsqueeze(1)
    # What is large in q is small in k and the other way round, as in models: of scores in the
    # hundreds bfloat16 keeps too few digits to judge anything by.
    k[..., one] += 30
    q[..., one] *= 0.05
    q[:, -1, one] += 1.3 * head_dim**0.5
    q[..., two] *= 30
    k[..., two] *= 0.1
    v[..., three] *= 40
    dout[..., three] *= 0.1
    dout[..., four] *= 20
    # What lies between the rows of q is not a number, for who reads past a row.
    wide_q = q.new_full((q.shape[0], num_heads + 2, head_dim), math.nan, dtype=request.dtype)
    wide_kv = k.new_empty(k.shape[0], 2 * num_kv_heads, head_dim, dtype=request.dtype)
    return Probe(
        "outlier inputs",
        wide_q[:, 1:-1].copy_(q),
        wide_kv[:, :num_kv_heads].copy_(k),
        wide_kv[:, num_kv_heads:].copy_(v),
        dout.to(request.dtype),
        drawn.layout_q,
        drawn.layout_k,
    )


def draw_codes(request: AttentionRequest, seed: int) -> Probe:
    """Draws q = 0 and signs in v and dout, whose sums tell which keys were visible.

    Every visible key has the same weight. dout holds its row's number of visible keys too, by which
    the weights divide it.
    """
    kind = _kind(request)
    drawn = _draw(request, seed, [(n, n) for n in _SQUARE[kind]] + list(_CROSSED[kind]))
    counts = visible_counts(request, drawn.layout_q, drawn.layout_k, request.device)
    # Of a large group eight heads: what kernels round when they add up dv of more hides one key.
    groups = drawn.q.shape[1] // drawn.k.shape[1]
    chosen = torch.arange(drawn.q.shape[1], device=request.device) % max(1, groups // 8) == 0
    codes = drawn.dout.sign() * chosen.unsqueeze(1)
    return Probe(
        "the mask probe",
        torch.zeros_like(drawn.q, dtype=request.dtype),
        drawn.k.to(request.dtype),
        drawn.v.sign().to(request.dtype),
        (codes * counts * CODE_OF_DOUT).to(request.dtype),
        drawn.layout_q,
        drawn.layout_k,
    )


class _Drawn(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    layout_q: VarlenLayout
    layout_k: VarlenLayout


def _draw(request: AttentionRequest, seed: int, pairs: Sequence[tuple[int, int]]) -> _Drawn:
    device = request.device
    num_heads, num_kv_heads = probed_heads(request)
    layout_q = VarlenLayout.from_lengths([n for n, _ in pairs], device=device)
    layout_k = VarlenLayout.from_lengths([m for _, m in pairs], device=device)
    # A generator of its own: the caller's random numbers stay as they are.
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(total: int, heads: int) -> Tensor:
        shape = (total, heads, request.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    return _Drawn(
        normal(layout_q.total, num_heads),
        normal(layout_k.total, num_kv_heads),
        normal(layout_k.total, num_kv_heads),
        normal(layout_q.total, num_heads),
        layout_q,
        layout_k,
    )


def _kind(request: AttentionRequest) -> str:
    return "cpu" if request.device.type == "cpu" else "gpu"
