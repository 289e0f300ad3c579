"""Which backend attends from one token a row to the row's own keys, and the reason if none does."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from padless.backends.request import AttentionRequest
from padless.dispatch import no_autocast
from padless.errors import BackendUnavailableError
from padless.generation.store import RaggedStore
from padless.qualification.decoding import decoding_fault
from padless.selection import BACKENDS, adapter

# Fastest first. FlashAttention-4 compiles for seconds and gains little where one query waits for
# the keys to be read.
DECODERS = ("torch_varlen", "fa4", "sdpa")


@dataclass(frozen=True)
class Decoder:
    """A backend that decodes a kind of request.

    Attributes:
        name: of the backend.
        backend: its adapter.
        with_mask: whether it reads a mask.
    """

    name: str
    backend: ModuleType
    with_mask: bool

    def attend(self, store: RaggedStore, layer_idx: int, q: Tensor, scale: float) -> Tensor:
        """Attends to all that a row has in a layer, the step's own keys and values included.

        Args:
            store: of the `generate` call; the step's keys and values of the layer are in it.
            layer_idx: of the layer.
            q: `(batch, num_heads, head_dim)`.
            scale: factor of the scores.

        Returns:
            `(batch, num_heads, head_dim)`.
        """
        buffers = store.layers[layer_idx]
        assert buffers is not None
        with no_autocast(q):
            out: Tensor = self.backend.decode(q, *buffers, store.rows, softmax_scale=scale)
        return out


def choose_decoder(request: AttentionRequest, backend: str) -> Decoder:
    """Chooses the first backend that takes a request and decodes it right on this device.

    Args:
        request: of q and the buffers; without gradients.
        backend: "auto", or the name of the only one to ask.

    Raises:
        BackendUnavailableError: none does, with the reasons.
    """
    reasons = []
    for name in DECODERS if backend == "auto" else (backend,):
        if name not in DECODERS:
            reasons.append(
                f"{name} does not decode, of {', '.join(BACKENDS)} only these do: "
                f"{', '.join(DECODERS)}"
            )
            continue
        module = adapter(name)
        reason = module.reject_decode(request) or decoding_fault(module, request)
        if reason is None:
            return Decoder(name, module, name == "sdpa" and request.device_type != "cpu")
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailableError("; ".join(reasons))


def decoder_of(store: RaggedStore, num_key_value_groups: int, backend: str) -> Decoder:
    """Chooses what attends to a store, as `choose_decoder` does.

    Args:
        store: filled with the prompt.
        num_key_value_groups: query heads to a KV head.
        backend: as for `choose_decoder`.

    Raises:
        BackendUnavailableError: none does, with the reasons.
    """
    buffers = store.layers[0]
    assert buffers is not None  # the prompt has been through the first layer
    k = buffers[0]
    num_heads = k.shape[2] * num_key_value_groups
    request = AttentionRequest(k.device, k.dtype, k.shape[-1], num_heads, k.shape[2], causal=False)
    return choose_decoder(request, backend)
