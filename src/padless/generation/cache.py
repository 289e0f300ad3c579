"""What transformers sees of a `RaggedStore`: the cache that it made itself, until it looks inside.

While `generate` only asks how long the cache is, or reorders its beams, the store answers. Whoever
wants anything else of it finds an ordinary DynamicCache in its padded form.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from padless.generation.store import RaggedStore

_STORE = "_padless_store"
# Attributes that say nothing of what is stored.
_HARMLESS = frozenset({_STORE, "_is_user_defined", "offloading"})


def attach_store(cache: Any, store: RaggedStore) -> None:
    """Makes an empty DynamicCache the face of a store.

    Args:
        cache: of transformers, without a token.
        store: filled with the prompt.
    """
    plain: Any = type(cache)
    cache.__dict__[_STORE] = store
    cache.__class__ = _ragged(plain)


def store_of(cache: Any) -> RaggedStore | None:
    """Finds the store behind a cache; None if there is none (any more)."""
    if vars(type(cache)).get("_padless_plain") is None:
        return None
    # Past the class's own look at every attribute: this is asked once a token.
    found: RaggedStore | None = object.__getattribute__(cache, "__dict__").get(_STORE)
    return found


def settle(cache: Any) -> None:
    """Makes a cache the ordinary one of transformers, with its tokens in the padded form."""
    store = _detach(cache)
    if store is None:
        return
    with torch.no_grad():
        for layer_idx in range(len(store.layers)):
            padded = store.padded(layer_idx)
            if padded is not None:
                columns = torch.arange(store.columns, device=padded[0].device)
                cache.update(*padded, layer_idx, {"cache_position": columns})
            # Layer by layer, so that no more than one is there twice.
            store.layers[layer_idx] = None


def discard(cache: Any) -> None:
    """Makes a cache the ordinary one of transformers again, without a token."""
    store = _detach(cache)
    if store is not None:
        store.release()


def _detach(cache: Any) -> RaggedStore | None:
    plain = vars(type(cache)).get("_padless_plain")
    if plain is None:
        return None
    object.__setattr__(cache, "__class__", plain)
    store: RaggedStore | None = cache.__dict__.pop(_STORE, None)
    return store


def _through(name: str) -> Any:
    """Makes a method that is looked up on the class find an ordinary cache."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        return getattr(self, name)(*args, **kwargs)

    return method


@functools.cache
def _ragged(plain: Any) -> Any:
    """Makes the class of caches that have a store; all else of them makes them ordinary first."""

    def get_seq_length(self: Any, layer_idx: int | None = 0, *args: Any, **kwargs: Any) -> int:
        return int(self.__dict__[_STORE].columns)

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        store = self.__dict__[_STORE]
        if not store.is_whole:
            settle(self)
            return self.reorder_cache(beam_idx)
        store.select_rows(beam_idx)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        store = self.__dict__[_STORE]
        if not store.is_whole:
            settle(self)
            return self.batch_repeat_interleave(repeats)
        store.copy_rows(repeats)

    def __getattribute__(self: Any, name: str) -> Any:
        if name in body or name in _HARMLESS or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        settle(self)
        return getattr(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in _HARMLESS:
            settle(self)
        object.__setattr__(self, name, value)

    def __copy__(self: Any) -> Any:
        settle(self)
        return copy.copy(self)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        settle(self)
        return copy.deepcopy(self, memo)

    # Methods of transformers read attributes, and so settle by themselves; pickle's do not.
    body: dict[str, Any] = {name: _through(name) for name in ("__reduce__", "__reduce_ex__")}
    body.update(
        get_seq_length=get_seq_length,
        reorder_cache=reorder_cache,
        batch_repeat_interleave=batch_repeat_interleave,
        batch_select_indices=reorder_cache,
        is_compileable=False,
        __getattribute__=__getattribute__,
        __setattr__=__setattr__,
        __copy__=__copy__,
        __deepcopy__=__deepcopy__,
        __module__=plain.__module__,
        __qualname__=plain.__qualname__,
        __doc__=plain.__doc__,
        _padless_plain=plain,
    )
    return type(plain.__name__, (plain,), body)
