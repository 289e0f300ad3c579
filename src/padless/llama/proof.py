"""Proof that an engagement took effect: a tiny LLaMA of the installed transformers, run twice."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from padless.environment import has_sdpa, trial_device
from padless.errors import EngagementError
from padless.llama.ledger import ledger

_LAYERS = 2
# Rounding of two layers, on a GPU perhaps TF32's; a mask or a head mixed up is off by tenths.
_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}


@dataclass(frozen=True)
class TinyOutputs:
    """Hidden states of real tokens, `(tokens, hidden_size)`, and how often padless was called."""

    evaluation: Tensor
    training: Tensor
    served: int


@torch.no_grad()
def tiny_outputs() -> TinyOutputs:
    """Runs a tiny LLaMA on a left- and a right-padded row, in evaluation and in training.

    The caller's random state, default dtype, device and autocast stay as they are and out of it.
    """
    from transformers import LlamaConfig, LlamaModel

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
    device = trial_device()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], device=device)
    ids = torch.arange(1, 13, device=device).view(2, 6)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        device,
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(0)
        model = LlamaModel(config).float()
        # Apart from other layers, whose counts go when they do.
        kept = ledger.exchange(weakref.WeakKeyDictionary())
        try:
            outputs = [
                model.train(mode)(ids, attention_mask=mask, return_dict=True).last_hidden_state[
                    mask.bool()
                ]
                for mode in (False, True)
            ]
            served = sum(record.calls for record in ledger.records())
        finally:
            ledger.exchange(kept)
        return TinyOutputs(outputs[0], outputs[1], served)


def prove_engaged(before: TinyOutputs) -> None:
    """Checks that the patched classes serve every layer, and give what the stock ones gave.

    Raises:
        EngagementError: some layer was not served, or the outputs differ.
    """
    after = tiny_outputs()
    if after.served != 2 * _LAYERS:
        raise EngagementError(
            f"the patch must serve every attention layer, got {after.served} of {2 * _LAYERS} "
            f"calls in a small model; this transformers builds its layers otherwise"
        )
    for mode in ("evaluation", "training"):
        error = (getattr(after, mode) - getattr(before, mode)).abs().max().item()
        if not error <= _TOLERANCE[trial_device().type]:
            raise EngagementError(
                f"the patch must compute what transformers computes, got hidden states off by "
                f"{error:.3g} in {mode} of a small model"
            )
