"""A padded batch made flat on the device, before anything is known of it on the host.

Owns the choice of who does it. The kernels are in `unpad_triton`; where they do not serve,
`unpadded.structure` does the same by torch's operations, a few dozen of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from padless.environment import is_compiling, is_tracing
from padless.kernels.launch import is_gpu
from padless.kernels.trial import faults_by

IGNORED = -100  # the label that transformers' losses ignore


@dataclass(frozen=True)
class FlatTokens:
    """What a batch says of each token, for its real ones alone: `(total,)` each.

    Attributes:
        positions: int64.
        input_ids: None if there are none.
        labels: ignored at each token that does not follow the one in front of it in its row; None
            if there are none.
        shift_labels: as they were; None if there are none.
    """

    positions: Tensor
    input_ids: Tensor | None
    labels: Tensor | None
    shift_labels: Tensor | None

    def cut(self, total: int) -> FlatTokens:
        """Takes the first tokens of buffers that hold more."""
        ids, labels, shift_labels = (
            x if x is None else x[:total] for x in (self.input_ids, self.labels, self.shift_labels)
        )
        return FlatTokens(self.positions[:total], ids, labels, shift_labels)


@dataclass(frozen=True)
class Unpadded:
    """A flat batch in buffers of `batch * seqlen`, of which only the first `total` are filled.

    Attributes:
        numbers: int64 `(2 * batch,)`: the real tokens of each row, then its labels that the
            unpatched loss compares with an output at padding.
        cu_seqlens: int32 `(batch + 1,)`, boundaries of the rows.
        indices: int64, the real slots of `(batch, seqlen)`.
        tokens: the rest; a position is its slot's column.
    """

    numbers: Tensor
    cu_seqlens: Tensor
    indices: Tensor
    tokens: FlatTokens


def unpad_rows(
    key_padding_mask: Tensor,
    input_ids: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
) -> Unpadded | None:
    """Makes a padded batch flat by two kernels, without waiting for the device.

    Args:
        key_padding_mask: bool or integer `(batch, seqlen)`, nonzero = real.
        input_ids: integer `(batch, seqlen)`; None if there are none.
        labels: integer `(batch, seqlen)`, each compared with the output one slot earlier, or None.
        shift_labels: integer `(batch, seqlen)`, each compared with the output of its own slot, or
            None.

    Returns:
        The flat batch; None where the kernels do not serve.
    """
    tensors = [x for x in (key_padding_mask, input_ids, labels, shift_labels) if x is not None]
    if not _serves(tensors):
        return None
    from padless.kernels import unpad_triton  # imports Triton

    return unpad_triton.unpad(key_padding_mask, input_ids, labels, shift_labels)


def _serves(tensors: list[Tensor]) -> bool:
    if is_compiling() or is_tracing():
        return False
    mask = tensors[0]
    # The first 2^31 boundaries fit; what is longer is refused elsewhere.
    fits = 0 < mask.numel() < 2**31
    for x in tensors:
        is_plain = type(x) is Tensor and x.device == mask.device and x.shape == mask.shape
        fits = fits and is_plain and not (x.is_floating_point() or x.is_complex())
    return fits and is_gpu(mask.device) and _fault(mask.device) is None


def _try(device: torch.device) -> None:
    """Makes three rows flat; raises if that is wrong."""
    from padless.kernels import unpad_triton

    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], device=device)
    ids = torch.arange(9, device=device).view(3, 3)
    found = unpad_triton.unpad(mask, ids, ids + 10, ids + 20)
    for name, numbers in {
        "numbers": [2, 0, 2, 2, 5, 3],
        "cu_seqlens": [0, 2, 2, 4],
        "indices": [1, 2, 6, 8],
        "positions": [1, 2, 0, 2],
        "input_ids": [1, 2, 6, 8],
        "labels": [IGNORED, 12, IGNORED, IGNORED],
        "shift_labels": [21, 22, 26, 28],
    }.items():
        of = found.tokens if hasattr(found.tokens, name) else found
        got = getattr(of, name)[: len(numbers)]
        torch.testing.assert_close(got, torch.tensor(numbers, dtype=got.dtype, device=device))


_fault = faults_by(_try)
