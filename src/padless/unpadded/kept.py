"""Keys and values that a call behind this one may want: put into its cache when somebody looks.

A model keeps a cache unless it is told not to, in training too, where nobody reads it. Stock layers
have keys and values in the cache's form at hand; a flat batch would have to pad both in each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padless.layout import VarlenLayout


class KeptKeys:
    """The keys and values of a flat batch by layer, as long as they are not in a cache."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor, VarlenLayout]] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    def put(self, layer_idx: int, k: Tensor, v: Tensor, layout: VarlenLayout) -> None:
        """Keeps a layer's keys and values, which nobody may write to from now on.

        Args:
            layer_idx: of the layer.
            k: `(total, num_kv_heads, head_dim)`, rotated.
            v: shape of k.
            layout: of the batch, on k's device.
        """
        self._layers[layer_idx] = (k, v, layout)

    def fill(self, past: Any) -> Any:
        """Puts everything into a cache, padded as transformers goes on with it, and lets go of it.

        Args:
            past: a Cache of transformers that holds nothing yet.

        Returns:
            The same cache.
        """
        for layer_idx in sorted(self._layers):
            put_into_cache(past, layer_idx, *self._layers.pop(layer_idx))
        return past


def put_into_cache(past: Any, layer_idx: int, k: Tensor, v: Tensor, layout: VarlenLayout) -> None:
    """Puts a layer's keys and values of a flat batch into a cache, in its padded form."""
    columns = torch.arange(layout.seqlen, device=k.device)
    past.update(*padded_keys(k, v, layout), layer_idx, {"cache_position": columns})


def padded_keys(k: Tensor, v: Tensor, layout: VarlenLayout) -> tuple[Tensor, Tensor]:
    """Pads keys and values to `(batch, num_kv_heads, seqlen, head_dim)`, zeros at padding."""
    return layout.pad(k).transpose(1, 2), layout.pad(v).transpose(1, 2)
