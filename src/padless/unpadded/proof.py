"""Proof that a patch takes effect: a tiny LLaMA of the installed transformers, before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from padless.environment import has_sdpa, trial_device
from padless.errors import EngagementError
from padless.hf.eras import NEWEST_TESTED, Era

_LAYERS = 2
# Rounding of two layers, on a GPU perhaps TF32's; a mask or a head mixed up is off by tenths.
_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
_proven: set[Any] = set()
_generation_faults: dict[str, str | None] = {}


def prove(engage: Callable[[Any], Callable[[], None]], era: Era) -> None:
    """Checks on a tiny model that engaging changes nothing but what is computed.

    Args:
        engage: puts the patch in place for a model, and returns what takes it back.
        era: of the installed transformers.

    Raises:
        EngagementError: loss, gradients or logits of real tokens differ.
    """
    from transformers import __version__

    if (__version__, engage.__code__) in _proven:
        return
    device = trial_device()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        device,
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(0)
        model = _tiny_model()
        before = _outputs(model)
        revert = engage(model)
        try:
            after = _outputs(model)
        finally:
            revert()
    for name, expected in before.items():
        error = (after[name] - expected).abs().max().item()
        if not error <= _TOLERANCE[trial_device().type]:
            raise EngagementError(
                f"the patch must compute what transformers {__version__} (era {era.name}) "
                f"computes, got {name} off by {error:.3g} in a small model"
            )
    _proven.add((__version__, engage.__code__))


def generation_fault(engage: Callable[[Any], Callable[[], None]], era: Era) -> str | None:
    """Says why `generate` must not be looked into on the installed transformers; None if it may.

    Args:
        engage: puts the patch in place for a model, and returns what takes it back.
        era: of the installed transformers.

    Note:
        Tested versions are not asked: only what is newer may have another `generate` or cache.
    """
    from transformers import __version__

    if era.returned != 2 or Version(__version__).release[:2] <= NEWEST_TESTED.release[:2]:
        return None
    if __version__ not in _generation_faults:
        try:
            same = _generates_the_same(engage)
            found = None if same else "other tokens"
        except Exception as error:
            # Whatever does not suit a version that nobody has seen: its own generate is left.
            lines = str(error).strip().splitlines() or [""]
            found = f"{type(error).__name__}: {lines[0]}"
        _generation_faults[__version__] = found and f"on transformers {__version__}: {found}"
    return _generation_faults[__version__]


def _generates_the_same(engage: Callable[[Any], Callable[[], None]]) -> bool:
    device = trial_device()
    ids = torch.arange(1, 13, device=device).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], device=device)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    options.update(pad_token_id=0, eos_token_id=None, attention_mask=mask)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(0)
        with device:
            model = _tiny_model().eval()
        for ways in ({}, {"num_beams": 2}):
            before = model.generate(ids, **options, **ways)
            revert = engage(model)
            try:
                after = model.generate(ids, **options, **ways)
            finally:
                revert()
            if not torch.equal(before, after):
                return False
    return True


def _tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        use_cache=False,
        # The default would call what this torch does not have.
        **({} if has_sdpa() else {"attn_implementation": "eager"}),
    )
    return LlamaForCausalLM(config).float()


def _outputs(model: Any) -> dict[str, Tensor]:
    """Runs a left- and a right-padded row; returns what depends on real tokens only."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    ids = torch.arange(1, 13).view(2, 6)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2] = -100
    model.train()
    outputs = model(ids, attention_mask=mask, labels=labels, return_dict=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(outputs.loss, [weight])
    return {
        "the loss": outputs.loss.detach(),
        "a gradient": gradient,
        "the logits": outputs.logits[mask.bool()].detach(),
    }
