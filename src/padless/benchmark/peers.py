"""What padless is timed beside: which peers there are, and why one cannot run here."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from padless.benchmark.batches import Batch
from padless.benchmark.names import PADLESS, UNPATCHED, with_liger
from padless.benchmark.training_step import Builder, TrainingStep
from padless.environment import import_optional

# Name, and what it needs: a module (with the command that installs it), and a GPU.
_NEEDS: dict[str, tuple[str, str, bool]] = {
    "sdpa": ("", "", False),
    "eager": ("", "", False),
    "flash_attention_2": ("flash_attn.bert_padding", "pip install flash-attn", True),
    "flash_attention_4": ("flash_attn.cute", "pip install flash-attn-4", True),
    "liger": ("liger_kernel", "pip install liger-kernel", True),
    "compile": ("", "", False),
}
PEERS = tuple(_NEEDS)
# torch.compile takes minutes to build what it then runs; it is there for who asks.
LATE = ("compile",)
DEFAULT_PEERS = tuple(name for name in PEERS if name not in LATE)


def check_peers(peers: Sequence[str]) -> tuple[str, ...]:
    """Returns the peers without repetitions.

    Raises:
        ValueError: there is no peer of that name.
    """
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"peers must be of {', '.join(PEERS)}, got {name!r}")
    return tuple(dict.fromkeys(peers))


def reason_against(peer: str, device: torch.device) -> str | None:
    """Tells why a peer cannot run on this machine and device; None if nothing speaks against it.

    Args:
        peer: its name.
        device: of the model.
    """
    module, install, needs_gpu = _NEEDS[peer]
    if needs_gpu and device.type != "cuda":
        return f"runs on a CUDA device only, and the model is on {device.type}"
    if module:
        found, reason = import_optional(module)
        if found is None:
            return f"{reason}; `{install}`"
    return None


def builders(
    step: TrainingStep,
    peers: Sequence[str],
    *,
    attention: str,
    device: torch.device,
    new_lengths: bool,
) -> tuple[dict[str, Builder], dict[str, str]]:
    """Makes what builds each row: unpatched, padless, then the peers.

    Args:
        step: of the model.
        peers: their names.
        attention: the model's own implementation, which is no peer of itself.
        device: of the model.
        new_lengths: whether every step has a batch of another shape.

    Returns:
        Builders by row, and reasons by row for those that cannot be had.
    """
    made: dict[str, Builder] = {
        UNPATCHED: functools.partial(step.stock, None, Batch.padded),
        PADLESS: step.padless,
    }
    without: dict[str, str] = {}
    for peer in peers:
        if peer == attention:
            continue
        is_liger = peer == "liger"
        rows = tuple(map(with_liger, (UNPATCHED, PADLESS))) if is_liger else (peer,)
        reason = reason_against(peer, device)
        if reason is not None:
            without.update(dict.fromkeys(rows, reason))
        elif is_liger:
            made[rows[0]] = functools.partial(step.stock, None, Batch.padded, liger=True)
            made[rows[1]] = functools.partial(step.padless, liger=True)
        elif peer == "compile":
            made[peer] = functools.partial(step.compiled, dynamic=new_lengths or None)
        else:
            made[peer] = functools.partial(step.stock, peer, Batch.padded)
    return made, without
