"""Whether the host or the device is what a layer waits for, by what a call has to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from padless.backends.request import AttentionRequest
from padless.layout import VarlenLayout

# Of a decoder layer, and of attention in it, in floating point operations of a training step, or of
# a forward alone: on an H100 they take as long as the host for a layer, and for a slow launch.
_LITTLE_LAYER = 1e12
_LITTLE_ATTENTION = 5e10

_as_if_much: ContextVar[bool] = ContextVar("padless_as_if_much_work", default=False)


@contextmanager
def as_if_much_work() -> Iterator[None]:
    """Lets `auto` choose for a small batch what it chooses for a large one; for `verify`."""
    token = _as_if_much.set(True)
    try:
        yield
    finally:
        _as_if_much.reset(token)


def has_little_work(
    request: AttentionRequest, layout_q: VarlenLayout, layout_k: VarlenLayout
) -> bool:
    """Whether the host, which launches kernels, is what such a layer waits for.

    How large the layer is around the heads is guessed: twelve square matrices, as LLaMA has them.

    Note:
        A guess that is off costs microseconds, whichever way. H100, torch 2.11, flash-attn-4 b36:
        a training step's two launches take 350 us, those of torch's own kernel 150 us, while that
        kernel takes the device 268 us for 8 sequences of 1024 tokens, 9 heads of 64.
    """
    if request.device.type != "cuda" or _as_if_much.get():
        return False
    width, trains = request.num_heads * request.head_dim, request.needs_grad
    if not is_little_layer(layout_q.total, width, trains=trains):
        return False
    pairs = sum(n * m for n, m in zip(layout_q.lengths, layout_k.lengths, strict=True))
    per_pair = (14 if trains else 4) * width
    return (per_pair // 2 if request.causal else per_pair) * pairs <= _LITTLE_ATTENTION


def is_little_layer(tokens: int, width: int, *, trains: bool) -> bool:
    """Whether the host takes longer to launch a decoder layer than a GPU to compute its products.

    Args:
        tokens: of a flat batch.
        width: of the model, its `hidden_size`.
        trains: whether there will be a backward.
    """
    return (72 if trains else 24) * tokens * width**2 <= _LITTLE_LAYER
