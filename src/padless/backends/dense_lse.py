"""The operators below SDPA: they give the logarithms of their sums, and take them back.

`scaled_dot_product_attention` keeps both to itself. Their causal mask is aligned top-left, and they
know no groups of heads. `reject_lse` says what they are not called for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from padless.backends.dense_batches import by_lengths
from padless.backends.limits import in_reach
from padless.backends.request import AttentionRequest, Window
from padless.layout import VarlenLayout

# What is called by position, and what else has to be there, in torch 2.2 to 2.13.
_SCHEMAS = {
    "cpu": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "query key value dropout_p is_causal | scale",
        "grad_out query key value out logsumexp dropout_p is_causal | scale",
    ),
    "cuda": (
        "_scaled_dot_product_efficient_attention",
        "query key value attn_bias compute_log_sumexp dropout_p is_causal | scale",
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p "
        "grad_input_mask is_causal | scale",
    ),
}
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
# The kernel on CUDA reads rows of the logarithms that are a multiple of this apart.
_LSE_ROWS = 32
# A batch is a dimension of the grid on CUDA, which ends at 65535.
_MOST_SEQUENCES = 2**15


@functools.cache
def _operators(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Finds the operators of a kind of device, forward and backward; None if they are others."""
    if device_type not in _SCHEMAS:
        return None
    name, *schemas = _SCHEMAS[device_type]
    found: list[Callable[..., Any]] = []
    for each, schema in zip((name, name + "_backward"), schemas, strict=True):
        operator: Any = getattr(getattr(torch.ops.aten, each, None), "default", None)
        arguments = [a.name for a in operator._schema.arguments] if operator is not None else []
        positional, _, named = schema.partition(" | ")
        expected = positional.split()
        if arguments[: len(expected)] != expected or named not in arguments[len(expected) :]:
            return None
        found.append(operator)
    return found[0], found[1]


def reject_lse(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> str | None:
    """Says why SDPA cannot give the logarithms of its sums for this call; None if it can.

    Served are calls without a window, whose queries see all keys, or as many as there are in front
    of them and their own: what a ring asks for.
    """
    kind = request.device_type
    if _operators(kind) is None:
        return f"torch {torch.__version__} has no operator that gives them on {kind}"
    if request.dtype not in _DTYPES[kind]:
        return f"gives them in {', '.join(map(str, _DTYPES[kind]))} alone, got {request.dtype}"
    if request.window_size != (None, None):
        return f"gives them without a window alone, got {request.window_size}"
    if request.causal and layout_q.lengths != layout_k.lengths:
        return "gives them under a causal mask for as many keys as queries alone"
    return _reject_gpu(request) if kind == "cuda" else None


def _reject_gpu(request: AttentionRequest) -> str | None:
    if torch.version.hip is not None:
        return "gives them on NVIDIA GPUs alone"
    if request.head_dim * request.dtype.itemsize % 16:
        return f"gives them for heads of a multiple of 16 bytes alone, got {request.head_dim}"
    capability = torch.cuda.get_device_capability(request.device)
    if request.dtype == torch.bfloat16 and capability < (8, 0):
        return f"gives them in bfloat16 from compute capability 8.0 on, got {capability}"
    if request.deterministic and request.needs_grad and not repeats_gradients():
        return "repeats its gradients under torch.use_deterministic_algorithms(True) only"
    return None


def repeats_gradients() -> bool:
    """Whether torch was told to have kernels whose gradients repeat, or none."""
    return torch.are_deterministic_algorithms_enabled() and (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends as `varlen`, where `reject_lse` has nothing against it.

    Returns:
        `(total_q, num_heads, head_dim)`, and the natural logarithms of the sums
        `(num_heads, total_q)`, float32, or float64 from float64; -inf where there is no key.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=exact)
    for part in _parts(layout_q, layout_k):
        dense, sums = _forward(*part.take(q, k, v), causal, softmax_scale)
        out[part.queries] = _packed(dense)
        lse[:, part.queries] = sums.transpose(0, 1).flatten(1).to(exact)
    return out, lse


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout_q: VarlenLayout,
    layout_k: VarlenLayout,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: Window = (None, None),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `varlen_with_lse`: dq, dk and dv.

    The operators weigh scores by exp(score - lse), and take out · dout off: with out and lse of
    more keys than these, that is these keys' share.
    """
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for part in _parts(layout_q, layout_k):
        n, seqlen_q, _ = part.shape
        own = tuple(_heads_first(x[part.queries], n) for x in (out, dout))
        rows = lse[:, part.queries].unflatten(1, (n, seqlen_q)).transpose(0, 1).contiguous()
        dense = _backward(part.take(q, k, v), own, rows, causal, softmax_scale)
        dq[part.queries] = _packed(dense[0])
        for grad, each in ((dk, dense[1]), (dv, dense[2])):
            # (n, h, s, d) to (n, hkv, s, d): a KV head's gradient is that of all its queries.
            heads = each.unflatten(1, (k.shape[1], -1)).sum(2)
            grad[part.keys] = _packed(heads)
    return dq, dk, dv


@dataclass(frozen=True, eq=False)
class _Part:
    """Sequences of one pair of lengths: a dense batch.

    Attributes:
        queries: their rows of the packed tensor; a stretch where they are neighbours.
        keys: likewise.
        shape: sequences, queries and keys of each.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    shape: tuple[int, int, int]

    def take(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Makes the dense batch `(n, num_heads, s, d)`, with KV heads for every query head."""
        n, groups = self.shape[0], q.shape[1] // k.shape[1]
        query, key, value = (
            _heads_first(x[rows], n)
            for x, rows in ((q, self.queries), (k, self.keys), (v, self.keys))
        )
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return query, key, value


# The layers of a forward share their layouts.
_known: weakref.WeakKeyDictionary[VarlenLayout, Any] = weakref.WeakKeyDictionary()


def _parts(layout_q: VarlenLayout, layout_k: VarlenLayout) -> tuple[_Part, ...]:
    """Groups the sequences that have queries and keys by their lengths; remembers the groups."""
    made = _known.setdefault(layout_q, weakref.WeakKeyDictionary())
    if layout_k not in made:
        made[layout_k] = _group(layout_q, layout_k)
    found: tuple[_Part, ...] = made[layout_k]
    return found


def _group(layout_q: VarlenLayout, layout_k: VarlenLayout) -> tuple[_Part, ...]:
    parts = []
    for (seqlen_q, seqlen_k), every in by_lengths(layout_q, layout_k).items():
        if not seqlen_k:
            continue
        for first in range(0, len(every), _MOST_SEQUENCES):
            same = every[first : first + _MOST_SEQUENCES]
            shape = (len(same), seqlen_q, seqlen_k)
            parts.append(_Part(_rows(layout_q, same), _rows(layout_k, same), shape))
    return tuple(parts)


def _rows(layout: VarlenLayout, members: list[int]) -> slice | Tensor:
    ends = layout.host_cu_seqlens.tolist()
    ranges = [(ends[index], ends[index + 1]) for index in members]
    if all(a[1] == b[0] for a, b in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    found = torch.cat([torch.arange(*each) for each in ranges])
    return found.to(layout.cu_seqlens.device, non_blocking=True)


def _heads_first(rows: Tensor, n: int) -> Tensor:
    """Makes packed rows of n sequences a dense batch: `(n * s, h, d)` to `(n, h, s, d)`."""
    return rows.unflatten(0, (n, -1)).transpose(1, 2)


def _packed(dense: Tensor) -> Tensor:
    return dense.transpose(1, 2).flatten(0, 1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    forward, _ = _of(q)
    if not q.is_cuda:
        out, lse = forward(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse
    q, k, v = (in_reach(x) for x in (q, k, v))
    out, lse, *_ = forward(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _backward(
    inputs: tuple[Tensor, ...], own: tuple[Tensor, ...], lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """Goes back in a dense batch: inputs are q, k and v, own are out and dout."""
    (q, k, v), (out, dout) = inputs, own
    _, backward = _of(q)
    if not q.is_cuda:
        dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, is_causal, scale=scale)
        return dq, dk, dv
    q, k, v, out, dout = (in_reach(x) for x in (q, k, v, out, dout))
    # Rows that are not there weigh nothing: exp(score - inf).
    lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ROWS), value=float("inf"))
    # State of a dropout that there is none of; the kernel may read it on the host.
    state = torch.zeros((), dtype=torch.int64)
    wanted = [True, True, True, False]
    dq, dk, dv, _ = backward(
        dout, q, k, v, None, out, lse, state, state, 0.0, wanted, is_causal, scale=scale
    )
    return dq, dk, dv


def _of(q: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    found = _operators("cuda" if q.is_cuda else "cpu")
    assert found is not None  # reject_lse() has said so otherwise
    return found
