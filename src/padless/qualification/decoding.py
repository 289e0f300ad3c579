"""Whether a backend decodes right on this device: one query a row against buffers filled in part.

Measured once for a kind of request in each process: it takes a millisecond or two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.backends.rows import CachedRows
from padless.qualification.isolation import isolated
from padless.qualification.probe import probed_heads
from padless.reference import reference_attention

Decode = Callable[..., Tensor]

# One key, some, on both sides of the kernels' tiles, and all slots.
_LENGTHS = (1, 2, 65, 128, 129, 300, 384)
_CAPACITY = 384
# Root mean square of a row's error over that of its numbers, in roundings of the dtype. Kernels
# round weights and the result once each, which is half a rounding together; one key too many or
# too few among 300 of the probe is six roundings of bfloat16 and more.
_BUDGET = 2.0

_lock = threading.Lock()
_faults: dict[tuple[str, AttentionRequest], str | None] = {}


def decoding_fault(backend: ModuleType, request: AttentionRequest) -> str | None:
    """Says what a backend computes wrong when it decodes; None if it is right.

    Args:
        backend: an adapter with `decode` that does not reject the request.
        request: what is asked, without gradients.

    Note:
        Waits for the device the first time. A backend that raises is at fault.
    """
    key = (backend.NAME, request)
    with _lock:
        if key not in _faults:
            try:
                with isolated(request.device), torch.no_grad():
                    _faults[key] = judge_decoding(backend.decode, request)
            except Exception as error:
                # Anything may come out of a package that is built for something else.
                lines = str(error).strip().splitlines() or [""]
                _faults[key] = f"raised {type(error).__name__}: {lines[0]}"
        return _faults[key]


def judge_decoding(decode: Decode, request: AttentionRequest, *, seed: int = 0) -> str | None:
    """Holds a backend's answer to a probe against float64; says what is wrong, None if nothing is.

    Args:
        decode: of the backend's adapter.
        request: what is asked.
        seed: of the inputs.
    """
    num_heads, num_kv_heads = probed_heads(request)
    device, dtype, head_dim = request.device, request.dtype, request.head_dim
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    batch = len(_LENGTHS)
    # Queries by which a row attends to a few of its keys, far from alike.
    q = 2 * draw(batch, num_heads, head_dim)
    k, v = (draw(batch, _CAPACITY, num_kv_heads, head_dim) for _ in range(2))
    lengths = torch.tensor(_LENGTHS, dtype=torch.int32, device=device)
    slots = torch.arange(_CAPACITY, device=device)
    mask = slots < lengths[:, None]
    # What stands behind a row's keys is large, so that it shows.
    v = v.masked_fill(~mask[..., None, None], 1000.0)
    counter = torch.arange(batch + 1, dtype=torch.int32, device=device)
    rows = CachedRows(lengths, counter, counter * _CAPACITY, mask if device.type != "cpu" else None)
    scale = head_dim**-0.5
    got = decode(q, k, v, rows, softmax_scale=scale)
    if got.shape != q.shape or got.dtype != dtype:
        return f"out has shape {tuple(got.shape)} and dtype {got.dtype}"
    right = [
        reference_attention(
            q[i][None, None].double(),
            k[i, :n][None].double(),
            v[i, :n][None].double(),
            softmax_scale=scale,
        )[0, 0]
        for i, n in enumerate(_LENGTHS)
    ]
    error = (got.double() - torch.stack(right)).square().mean((1, 2)).sqrt()
    size = torch.stack(right).square().mean((1, 2)).sqrt()
    eps = torch.finfo(dtype).eps
    # Kernels on GPUs make float32 of three TF32 products, or sum it in other orders.
    allowed = _BUDGET * eps if torch.finfo(dtype).bits < 32 else 256 * eps
    for length, ratio in zip(_LENGTHS, (error / size / allowed).tolist(), strict=True):
        if not ratio <= 1:
            return f"a row of {length} keys is off by {ratio:.3g} times its budget"
    return None
