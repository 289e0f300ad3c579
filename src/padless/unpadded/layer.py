"""The forward of an attention layer on a flat batch: project, rotate, attend, project."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from padless.answers import Selection
from padless.attention import varlen_attention
from padless.backends.request import AttentionRequest
from padless.dispatch import no_autocast, plan_call, run, validate_layouts
from padless.environment import is_compiling
from padless.hf.eras import Era
from padless.kernels.rotary import apply_rotary
from padless.kernels.rotary_keep import rotate_and_keep
from padless.parallel.ring_plan import Options
from padless.unpadded.batch import ARGUMENT, FlatBatch, Served
from padless.unpadded.kept import padded_keys, put_into_cache
from padless.unpadded.projections import is_plain, project

# A LlamaAttention of some transformers version: its attributes are not the same in all of them.
Layer = Any
Forward = Callable[..., Any]


def layer_forward(inner_of: Callable[[nn.Module], Forward], stock: Forward, era: Era) -> Forward:
    """Makes the forward that takes the place of an attention layer's.

    Args:
        inner_of: finds the bound forward that stood there, for calls without a flat batch.
        stock: the function whose signature it shows.
        era: of the installed transformers.
    """

    @functools.wraps(stock)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        batch = kwargs.get(ARGUMENT)
        if batch is None:
            batch = kwargs.get("attention_mask")
        if not isinstance(batch, FlatBatch):
            return inner_of(self)(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        out, present = _attend(self, hidden, batch, kwargs, era)
        return (out, None) if era.returned == 2 else (out, None, present)

    return forward


def _attend(
    module: Layer, hidden: Tensor, batch: FlatBatch, arguments: dict[str, Any], era: Era
) -> tuple[Tensor, Any]:
    """Attends within the sequences of a flat batch.

    Args:
        module: the attention layer.
        hidden: `(1, total, hidden_size)`.
        batch: the batch.
        arguments: what else the decoder layer hands over.
        era: of the installed transformers.

    Returns:
        `(1, total, hidden_size)` and the cache that the layer returns.
    """
    if batch.position_ids.device != hidden.device:
        batch = batch.to(hidden.device)
    total = hidden.shape[1]
    q, k, v = (x.view(total, -1, module.head_dim) for x in project(module, hidden))
    cos, sin = _rotary_tables(module, v, batch, arguments, era)
    inplace = is_plain(module.q_proj) and is_plain(module.k_proj)
    scale = float(getattr(module, "scaling", None) or module.head_dim**-0.5)
    store, decoder = batch.store, batch.decoder
    if store is not None and decoder is not None:
        index: int = module.layer_idx
        if not (inplace and rotate_and_keep(q, k, v, cos, sin, *store.newest(index))):
            q, k = _rotated(q, k, v, cos, sin, inplace=inplace)
            store.put_newest(index, k, v)
        out = decoder.attend(store, index, q, scale)
        return module.o_proj(out.reshape(1, total, -1)), None
    q, k = _rotated(q, k, v, cos, sin, inplace=inplace)
    present = _keep(module, k, v, batch, arguments, era)
    if batch.shard is not None:
        out = _attend_shared(module, q, k, v, batch, scale)
    elif is_compiling():
        out = varlen_attention(q, k, v, batch.layout, softmax_scale=scale, backend=batch.backend)
    else:
        out = _attend_planned(module, q, k, v, batch, scale)
    return module.o_proj(out.reshape(1, total, -1)), present


def _rotated(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool
) -> tuple[Tensor, Tensor]:
    q, k = apply_rotary(q, k, cos, sin, inplace=inplace)
    # Float32 norms promote q and k; values still have the dtype that the projection computed in.
    q, k = (x if x.dtype == v.dtype else x.to(v.dtype) for x in (q, k))
    return q, k


def _attend_over_ranks(
    module: Layer, q: Tensor, k: Tensor, v: Tensor, batch: FlatBatch, softmax_scale: float
) -> Tensor:
    """Attends where the ranks of a sequence group share the row."""
    shard = batch.shard
    assert shard is not None
    if shard.algorithm == "ulysses":
        return shard.attend_by_heads(
            q, k, v, lambda q, k, v: _attend_planned(module, q, k, v, batch, softmax_scale)
        )
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = Options(True, softmax_scale, deterministic, batch.backend, needs_grad)
    out = shard.attend_in_ring(q, k, v, options)
    local = shard.ring_plan(options, q.device).local
    _note(module, batch, local.plan(q, k).selection)
    return out


# Collectives, and what differs from batch to batch: not for torch.compile.
_attend_shared = torch._dynamo.disable(_attend_over_ranks)


def _note(module: Layer, batch: FlatBatch, selection: Selection) -> None:
    batch.served[id(module)] = Served(
        type(module).__name__, getattr(module, "layer_idx", None), selection
    )


def _attend_planned(
    module: Layer, q: Tensor, k: Tensor, v: Tensor, batch: FlatBatch, softmax_scale: float
) -> Tensor:
    """Does what `varlen_attention` does, choosing the backend once for all layers of a kind."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    key = (q.device, q.dtype, q.shape, k.shape, needs_grad, deterministic)
    plan = batch.plans.get(key)
    if plan is None:
        layout = batch.layout if batch.shard is None else batch.shard.layout
        validate_layouts(q, k, layout, layout)
        request = AttentionRequest.of(q, k, v, deterministic=deterministic)
        plan = plan_call(request, batch.backend, layout, layout)
        batch.plans[key] = plan
    _note(module, batch, plan.selection)
    with no_autocast(q):
        return run(
            plan,
            q,
            k,
            v,
            causal=True,
            softmax_scale=softmax_scale,
            window_size=(None, None),
            deterministic=deterministic,
        )


def _rotary_tables(
    module: Layer, v: Tensor, batch: FlatBatch, arguments: dict[str, Any], era: Era
) -> tuple[Tensor, Tensor]:
    """Finds cos and sin `(1, total, head_dim)`, from transformers' own tables."""
    given = arguments.get("position_embeddings")
    if given is not None:
        cos, sin = given
        return cos, sin
    if era.rotary == "seq_len":
        # The padded length, as the stock layer asks for: scaling types may depend on it.
        cos, sin = module.rotary_emb(v, seq_len=batch.layout.seqlen)
        cos, sin = (t.reshape(-1, t.shape[-1])[batch.position_ids] for t in (cos, sin))
        return cos, sin
    cos, sin = module.rotary_emb(v, batch.position_ids)
    return cos, sin


def _keep(
    module: Layer,
    k: Tensor,
    v: Tensor,
    batch: FlatBatch,
    arguments: dict[str, Any],
    era: Era,
) -> Any:
    """Puts keys and values into the cache in the padded form in which transformers goes on.

    Or into the store of a `generate` call, as they are; or keeps them for when the cache is read.

    Returns:
        What the layer returns as its cache.
    """
    if batch.store is not None:
        batch.store.put_prompt(module.layer_idx, k, v)
        return None
    past = arguments.get("past_key_values", arguments.get("past_key_value"))
    if past is None:
        if not arguments.get("use_cache") or era.returned == 2:
            return None
        # Before there were Cache objects.
        return padded_keys(k, v, batch.layout)
    if batch.kept is None or is_compiling():
        put_into_cache(past, module.layer_idx, k, v, batch.layout)
    else:
        batch.kept.put(module.layer_idx, k, v, batch.layout)
    return past
