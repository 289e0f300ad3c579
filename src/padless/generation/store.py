"""`RaggedStore`: keys and values of the real tokens of each row, and how many there are.

Knows torch alone. What transformers sees of it is `cache`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padless.backends.rows import CachedRows
from padless.layout import VarlenLayout

# Slots that a buffer grows by at least. A growth copies the buffers and costs a new CUDA graph.
_STEP = 256


class RaggedStore:
    """Keys and values of all layers: a row's tokens side by side from slot 0 on, no padding.

    Args:
        layout: of the prompt; one sequence a row, and the last slot of each row real.
        num_layers: of the model.
        most: tokens that a row may come to have, as far as the caller knows; None if it does not.

    Attributes:
        layout: as given.
        columns: slots of the padded batch so far: those of the prompt, and one for each step.
        longest: no row has more keys than this; known without asking the device.
        capacity: slots of each row.
        rows: what attention reads; its tensors are the same objects until the store grows.
        layers: k and v of each layer, `(batch, capacity, num_kv_heads, head_dim)`; None before
            the prompt has come to it.

    Note:
        Slots that hold no token are zero: attention by a mask weighs them by 0, which leaves
        nothing of any finite number.
    """

    def __init__(self, layout: VarlenLayout, num_layers: int, most: int | None = None) -> None:
        self.layout = layout
        self.columns = layout.seqlen
        self.longest = layout.max_seqlen
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._most = most
        device = layout.cu_seqlens.device
        batch = layout.batch
        starts = layout.cu_seqlens[:-1]
        lengths = (layout.cu_seqlens[1:] - starts).to(torch.int32)
        self.capacity = self._room(self.longest)
        self._counter = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.rows = CachedRows(lengths, self._counter, self._counter * self.capacity)
        # The slot of each row's newest token in the buffers without their first border.
        self._newest = self._slots()
        # Where each token of the prompt goes; the device is told how many there are.
        row = torch.repeat_interleave(self._counter[:-1], lengths, output_size=layout.total).long()
        self._places = torch.arange(layout.total, device=device) - starts.long()[row]
        self._places += row * self.capacity
        # Which row of the prompt each row goes on from; None before rows are moved.
        self._origin: Tensor | None = None
        # Which row of the whole each row is, and how many there are; None while none is left out.
        self._within: tuple[Tensor, int] | None = None

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return int(self.rows.lengths.shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether no row was left out."""
        return self._within is None

    @property
    def filled_bytes(self) -> int:
        """What the keys and values of all rows take, if each were as long as the longest may be."""
        held = [x for buffers in self.layers if buffers is not None for x in buffers]
        return sum(x[0, 0].numel() * x.element_size() for x in held) * self.longest * self.batch

    def put_prompt(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Keeps the prompt's keys and values of a layer.

        Args:
            layer_idx: of the layer.
            k: `(total, num_kv_heads, head_dim)`, packed by the layout.
            v: like k.
        """
        buffers = []
        for x in (k, v):
            buffer = x.new_zeros(self.batch * self.capacity, *x.shape[1:])
            buffer.index_copy_(0, self._places, x)
            buffers.append(buffer.view(self.batch, self.capacity, *x.shape[1:]))
        self.layers[layer_idx] = (buffers[0], buffers[1])

    def put_newest(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Keeps a layer's keys and values of the step's tokens.

        Args:
            layer_idx: of the layer.
            k: `(batch, num_kv_heads, head_dim)`.
            v: like k.
        """
        k_slots, v_slots, newest = self.newest(layer_idx)
        k_slots.index_copy_(0, newest, k)
        v_slots.index_copy_(0, newest, v)

    def newest(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gives where a layer's keys and values of the step's tokens are to be written.

        Returns:
            The slots of all rows for keys and for values, `(batch * capacity, num_kv_heads,
            head_dim)`, and int64 `(batch,)`, which of them is each row's.
        """
        buffers = self.layers[layer_idx]
        assert buffers is not None  # the prompt has been through this layer
        return buffers[0].flatten(0, 1), buffers[1].flatten(0, 1), self._newest

    def make_room(self) -> bool:
        """Grows the buffers if the next token does not fit; says whether they have moved."""
        if self.longest < self.capacity:
            return False
        old, self.capacity = self.capacity, self._room(self.longest)
        for index, buffers in enumerate(self.layers):
            if buffers is not None:
                self.layers[index] = (self._grown(buffers[0], old), self._grown(buffers[1], old))
            # Two of the old size at most are there beside the new ones.
            del buffers
        self.rows = CachedRows(self.rows.lengths, self._counter, self._counter * self.capacity)
        self._newest = self._slots()
        return True

    def begin_step(self, *, with_mask: bool) -> None:
        """Counts the token that each row is about to get, on the device alone.

        Args:
            with_mask: whether attention of this step reads a mask.
        """
        self.rows.lengths.add_(1)
        self._newest.add_(1)
        self.rows.key_padding_mask = None
        if with_mask:
            slots = torch.arange(self.capacity, dtype=torch.int32, device=self.rows.lengths.device)
            self.rows.key_padding_mask = slots < self.rows.lengths[:, None]

    def count_step(self) -> None:
        """Counts the same on the host, once the step is under way."""
        self.columns += 1
        self.longest += 1

    def select_rows(self, indices: Tensor) -> bool:
        """Makes each row a copy of another, as beam search does.

        Args:
            indices: int64 `(rows,)`, the row that each is to become.

        Returns:
            Whether the buffers have moved, which they do if there are more or fewer rows now.

        Note:
            No synchronisation. As many rows as before are written where they are, for a CUDA graph
            that reads them.
        """
        indices = indices.to(self.rows.lengths.device)
        origin = self._origin
        if origin is None:
            origin = torch.arange(self.batch, device=indices.device)
        self._origin = origin.index_select(0, indices)
        same = indices.shape[0] == self.batch
        lengths = self.rows.lengths.index_select(0, indices)
        for index, buffers in enumerate(self.layers):
            if buffers is None:
                continue
            if same:
                for buffer in buffers:
                    # Behind the longest row all rows are alike.
                    filled = buffer[:, : self.longest]
                    filled.copy_(filled.index_select(0, indices))
            else:
                k, v = (buffer.index_select(0, indices) for buffer in buffers)
                self.layers[index] = (k, v)
        if same:
            self.rows.lengths.copy_(lengths)
            self._newest.copy_(self._slots())
            return False
        device = lengths.device
        self._counter = torch.arange(indices.shape[0] + 1, dtype=torch.int32, device=device)
        self.rows = CachedRows(lengths, self._counter, self._counter * self.capacity)
        self._newest = self._slots()
        return True

    def copy_rows(self, copies: int) -> None:
        """Makes several neighbouring rows of each."""
        device = self.rows.lengths.device
        self.select_rows(torch.arange(self.batch, device=device).repeat_interleave(copies))

    def leave_out(self, indices: Tensor) -> None:
        """Keeps these rows alone; the padded form has zeros at all others from here on.

        Args:
            indices: int64 `(kept,)`, rising.
        """
        old, whole = self._within or (None, self.batch)
        self.select_rows(indices)
        self._within = (indices if old is None else old.index_select(0, indices), whole)

    def padded(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Gives a layer's keys and values as transformers keeps them, zeros at padding.

        Returns:
            Twice `(batch, num_kv_heads, columns, head_dim)`; None if the prompt has not come there.
        """
        buffers = self.layers[layer_idx]
        if buffers is None:
            return None
        real, place = self._padded_places()
        k, v = (
            buffer.flatten(0, 1).index_select(0, place).view(*real.shape, *buffer.shape[2:])
            for buffer in buffers
        )
        hidden = ~real[..., None, None]
        k, v = (self._whole(x.masked_fill(hidden, 0)).transpose(1, 2) for x in (k, v))
        return k, v

    def release(self) -> None:
        """Lets go of all buffers."""
        self.layers = [None] * len(self.layers)

    def _whole(self, x: Tensor) -> Tensor:
        """Puts rows where they are of the whole; zeros where rows were left out."""
        if self._within is None:
            return x
        kept, rows = self._within
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, kept, x)

    def _padded_places(self) -> tuple[Tensor, Tensor]:
        """Says which slots of the padded form are real, and which slots here they come from."""
        device = self.rows.lengths.device
        real = self.layout.pad(torch.ones(self.layout.total, dtype=torch.bool, device=device))
        if self._origin is not None:
            real = real.index_select(0, self._origin)
        steps = self.columns - self.layout.seqlen
        real = torch.cat([real, real.new_ones(real.shape[0], steps)], 1)
        place = (real.cumsum(1) - 1).clamp(min=0)
        place += torch.arange(real.shape[0], device=device)[:, None] * self.capacity
        return real, place.flatten()

    def _slots(self) -> Tensor:
        return (self.rows.cu_seqlens_k[:-1] + self.rows.lengths - 1).long()

    def _room(self, filled: int) -> int:
        """Chooses the slots of a row: half as many again as are filled, or all that it may need."""
        enough = -(-(filled + filled // 2 + _STEP) // _STEP) * _STEP
        if self._most is not None and filled < self._most <= max(enough, 2 * filled):
            return -(-self._most // 64) * 64
        return enough

    def _grown(self, buffer: Tensor, filled: int) -> Tensor:
        new = buffer.new_zeros(buffer.shape[0], self.capacity, *buffer.shape[2:])
        new[:, :filled] = buffer
        return new
