"""Where the real tokens of a batch are: `VarlenLayout`, built once and passed along as an argument.

Owns cu_seqlens, indices and the moves between padded and packed tensors. Knows nothing of models.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """Boundaries of the sequences in a packed tensor and where they sit in the padded one.

    Build it with `from_mask`, `from_lengths`, `from_cu_seqlens` or `from_position_ids`.

    Attributes:
        lengths: tokens of each sequence, in order; 0 is an empty sequence.
        cu_seqlens: int32 `(num_sequences + 1,)` on the data's device, starts at 0, non-decreasing.
        indices: int64 `(total,)`, the rows of the flattened padded tensor `(batch * seqlen, ...)`
            that are real; None when every row is.
        batch: rows of the padded tensor.
        seqlen: columns of the padded tensor.
        total: real tokens in all.
        max_seqlen: tokens of the longest sequence.
        host_cu_seqlens: cu_seqlens on the CPU; the very same tensor if the data is there.

    Note:
        `lengths` lives on the host: building a layout from a CUDA tensor synchronises once, and
        nothing after that does. Under torch.compile read tensors, `total` and `max_seqlen`, which
        become symbols, and not `lengths`, whose every value would be compiled for.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    indices: Tensor | None
    batch: int
    seqlen: int
    if TYPE_CHECKING:
        # No fields in truth: FSDP with mixed precision puts the dataclasses among a model's
        # arguments together anew by `dataclasses.replace`, which refuses fields without `init`.
        total: int = field(init=False)
        max_seqlen: int = field(init=False)
        host_cu_seqlens: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Read by every layer, and inside compiled code: once here, and as plain attributes.
        object.__setattr__(self, "total", sum(self.lengths))
        object.__setattr__(self, "max_seqlen", max(self.lengths, default=0))
        host = self.cu_seqlens
        if host.device.type != "cpu":
            host = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        object.__setattr__(self, "host_cu_seqlens", host)

    @property
    def padded_total(self) -> int:
        """Slots of the padded tensor, real and padding."""
        return self.batch * self.seqlen

    @classmethod
    def from_mask(cls, key_padding_mask: Tensor) -> VarlenLayout:
        """Builds the layout of a padded batch; real tokens may sit anywhere in their row.

        Args:
            key_padding_mask: `(batch, seqlen)`, bool or integer, nonzero = real token.

        Returns:
            One sequence a row; a row without a real token is an empty sequence.

        Raises:
            TypeError: the mask is not a bool or integer tensor.
            ValueError: the mask is not two-dimensional.
        """
        if not isinstance(key_padding_mask, Tensor) or not _is_integral(key_padding_mask):
            came = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
            raise TypeError(f"key_padding_mask must be a bool or integer tensor, got {came}")
        if key_padding_mask.dim() != 2:
            raise ValueError(
                f"key_padding_mask must have shape (batch, seqlen), "
                f"got {tuple(key_padding_mask.shape)}"
            )
        real = key_padding_mask != 0
        batch, seqlen = real.shape
        lengths = tuple(real.sum(dim=1).tolist())
        indices = None
        if sum(lengths) != batch * seqlen:
            indices = real.flatten().nonzero().squeeze(1)
        return cls(lengths, _cu_seqlens(lengths, real.device), indices, batch, seqlen)

    @classmethod
    def from_rows(
        cls, batch: int, seqlen: int, *, device: torch.device | str = "cpu"
    ) -> VarlenLayout:
        """Builds the layout of a batch without padding: every row is real from end to end.

        Note:
            Made on the device, without a copy from the host.
        """
        _check_total(batch * seqlen)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
        return cls((seqlen,) * batch, cu_seqlens, None, batch, seqlen)

    @classmethod
    def from_slots(
        cls,
        lengths: Sequence[int],
        indices: Tensor | None,
        batch: int,
        seqlen: int,
        *,
        device: torch.device | str = "cpu",
    ) -> VarlenLayout:
        """Builds a layout from what is known on the host, without waiting for the device.

        Args:
            lengths: tokens of each sequence, in the order of the slots.
            indices: int64 `(total,)`, the real slots of `(batch, seqlen)`, ascending; None if all.
            batch: rows of the padded tensor.
            seqlen: columns of the padded tensor.
            device: where the packed tensors live.
        """
        if indices is not None:
            indices = indices.to(device, non_blocking=True)
        return cls(tuple(lengths), _cu_seqlens(lengths, device), indices, batch, seqlen)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> VarlenLayout:
        """Moves the layout to a device; itself if it is there."""
        if self.cu_seqlens.device == torch.device(device):
            return self
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            indices=None
            if self.indices is None
            else self.indices.to(device, non_blocking=non_blocking),
        )

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> VarlenLayout:
        """Builds the layout of an already packed row of documents.

        Args:
            lengths: tokens of each document, none negative.
            device: where the packed tensors live.

        Raises:
            TypeError: a length is not an integer.
            ValueError: a length is negative.
        """
        try:
            lengths = tuple(operator.index(n) for n in lengths)
        except TypeError as error:
            raise TypeError(f"lengths must be integers, got {list(lengths)}") from error
        if any(n < 0 for n in lengths):
            raise ValueError(f"lengths must not be negative, got {list(lengths)}")
        return cls(lengths, _cu_seqlens(lengths, device), None, 1, sum(lengths))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> VarlenLayout:
        """Builds the layout from cumulative boundaries, as the packed kernels take them.

        Args:
            cu_seqlens: int32 or int64 `(num_sequences + 1,)`, first 0, non-decreasing.

        Raises:
            TypeError: not an integer tensor.
            ValueError: wrong shape, first entry not 0, or a boundary before the one in front of it.
        """
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            came = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
            raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {came}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(
                f"cu_seqlens must have shape (num_sequences + 1,), got {tuple(cu_seqlens.shape)}"
            )
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
        lengths = tuple(b - a for a, b in pairwise(bounds))
        if any(n < 0 for n in lengths):
            at = next(i for i, n in enumerate(lengths) if n < 0)
            raise ValueError(
                f"cu_seqlens must not decrease, got {bounds[at]} then {bounds[at + 1]} "
                f"at index {at + 1}"
            )
        # A copy: callers reuse such buffers, and lengths would then disagree with them.
        own = cu_seqlens.to(torch.int32).clone(memory_format=torch.contiguous_format)
        return cls(lengths, own, None, 1, bounds[-1])

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> VarlenLayout:
        """Builds the layout of packed rows from positions that restart at each document.

        Args:
            position_ids: integer `(batch, seqlen)` or `(seqlen,)`; a document begins at column 0
                and wherever a position is not its neighbour's plus one.

        Raises:
            TypeError: not an integer tensor.
            ValueError: not one- or two-dimensional.
        """
        integral = isinstance(position_ids, Tensor) and _is_integral(position_ids)
        if not integral or position_ids.dtype == torch.bool:
            came = getattr(position_ids, "dtype", type(position_ids).__name__)
            raise TypeError(f"position_ids must be an integer tensor, got {came}")
        if position_ids.dim() not in (1, 2):
            raise ValueError(
                f"position_ids must have shape (batch, seqlen) or (seqlen,), "
                f"got {tuple(position_ids.shape)}"
            )
        rows = position_ids if position_ids.dim() == 2 else position_ids.unsqueeze(0)
        batch, seqlen = rows.shape
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
        bounds = [*starts.flatten().nonzero().squeeze(1).tolist(), batch * seqlen]
        lengths = tuple(b - a for a, b in pairwise(bounds))
        return cls(lengths, _cu_seqlens(lengths, rows.device), None, batch, seqlen)

    def unpad(self, padded: Tensor) -> Tensor:
        """Drops the padding: `(batch, seqlen, ...)` to `(total, ...)`.

        Raises:
            ValueError: the leading shape is not this layout's `(batch, seqlen)`.
        """
        if padded.shape[:2] != (self.batch, self.seqlen):
            raise ValueError(
                f"padded must begin with shape {(self.batch, self.seqlen)}, "
                f"got {tuple(padded.shape)}"
            )
        flat = padded.reshape(self.padded_total, *padded.shape[2:])
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def pad(self, packed: Tensor) -> Tensor:
        """Puts packed tokens back: `(total, ...)` to `(batch, seqlen, ...)`, zeros at padding.

        Raises:
            ValueError: the first dimension is not this layout's `total`.
        """
        if packed.shape[0] != self.total:
            raise ValueError(f"packed must hold {self.total} tokens, got {packed.shape[0]}")
        shape = (self.batch, self.seqlen, *packed.shape[1:])
        if self.indices is None:
            return packed.reshape(shape)
        flat = packed.new_zeros(self.padded_total, *packed.shape[1:])
        return flat.index_copy(0, self.indices, packed).reshape(shape)

    def narrow(self, first: int, last: int) -> VarlenLayout:
        """Keeps the sequences `first` to `last - 1`: the layout of that stretch of packed tokens.

        Note:
            Made on the device; nothing waits for it. The stretch has no padded form.
        """
        lengths = self.lengths[first:last]
        cu_seqlens = self.cu_seqlens[first : last + 1]
        return VarlenLayout(lengths, cu_seqlens - cu_seqlens[0], None, 1, sum(lengths))

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Cuts packed tokens `(total, ...)` into one view a sequence."""
        return packed.split(list(self.lengths))


def _is_integral(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _cu_seqlens(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    _check_total(sum(lengths))
    sums = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.pad(sums, (1, 0)).to(device, non_blocking=True)


def _check_total(total: int) -> None:
    if total >= 2**31:
        raise ValueError(
            f"a layout must hold fewer than 2**31 tokens (cu_seqlens are int32), "
            f"got {total}; split the batch"
        )
