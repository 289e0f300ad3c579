"""What travels through the layers with a flat batch, as an argument and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padless.answers import Selection
from padless.dispatch import Plan
from padless.generation.decoder import Decoder
from padless.generation.store import RaggedStore
from padless.layout import VarlenLayout
from padless.parallel.shard import Shard
from padless.unpadded.kept import KeptKeys

# The name under which layers get the batch where unknown arguments reach them.
ARGUMENT = "padless_batch"


class Served(NamedTuple):
    """How one layer attended.

    Attributes:
        layer: its class.
        layer_idx: its index, None before transformers numbered layers.
        selection: the backend, with the reasons why others were passed over.
    """

    layer: str
    layer_idx: int | None
    selection: Selection


class FlatBatch:
    """The real tokens of a batch as one row, and what is needed to attend and to pad back.

    Attributes:
        layout: the sequences of the row, and where its tokens sit in the padded batch.
        position_ids: int64 `(1, total)`, the positions that the padded batch gave its tokens.
        backend: of `varlen_attention`, or "auto".
        host_syncs: host synchronisations that building it took, 0 or 1.
        served: what each layer did, by the module's id.
        plans: how calls of one kind are served, by what the layers tell of them.
        store: of the `generate` call that this batch belongs to; layers keep keys and values there.
        shard: this rank's part of the row, where several share it; positions are its own then,
            and layout is of the whole.
        decoder: attends, where the batch is one further token for each row of the store.
        kept: takes keys and values where the cache is the call's own and may be filled later; None
            where layers put them into the cache at once.

    Note:
        No dataclass: FSDP with mixed precision copies those among a layer's arguments, field by
        field, and what a layer notes here would be lost with the copy.
    """

    def __init__(
        self,
        layout: VarlenLayout,
        position_ids: Tensor,
        backend: str = "auto",
        host_syncs: int = 0,
        store: RaggedStore | None = None,
        decoder: Decoder | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.layout = layout
        self.position_ids = position_ids
        self.backend = backend
        self.host_syncs = host_syncs
        self.served: dict[int, Served] = {}
        self.plans: dict[Any, Plan] = {}
        self.store = store
        self.decoder = decoder
        self.shard = shard
        self.kept: KeptKeys | None = None

    @classmethod
    def of_step(cls, store: RaggedStore, decoder: Decoder) -> FlatBatch:
        """Makes the batch of a decoding step: one further token for each row of a store."""
        lengths = store.rows.lengths
        layout = VarlenLayout.from_rows(store.batch, 1, device=lengths.device)
        return cls(layout, lengths.view(1, -1), store=store, decoder=decoder)

    def __contains__(self, item: object) -> bool:
        # transformers 4.34 to 4.37 ask a mask whether a 0 is in it, and drop it if not.
        return True

    def to(self, device: Any, non_blocking: bool = False) -> FlatBatch:
        """Moves what layers read to a device; accelerate's hooks call it between devices."""
        if torch.device(device) == self.position_ids.device:
            return self
        moved = FlatBatch(
            self.layout.to(device),
            self.position_ids.to(device, non_blocking=non_blocking),
            self.backend,
            self.host_syncs,
            self.store,
            self.decoder,
            self.shard,
        )
        # What layers note is of the whole batch; how they are served may differ by device.
        moved.served = self.served
        moved.kept = self.kept
        return moved


@dataclass(frozen=True, eq=False)
class Passed:
    """A padded batch on its way from the outer door to the inner one, as its attention mask.

    Attributes:
        attention_mask: what the caller gave.
        packing: the caller's arguments that say where documents are; older versions would refuse
            them on the way.
        is_stock: whether the inner door has to leave the batch to the stock path.
        is_whole: why the ranks of a sequence group must not share the batch; None if they may.
    """

    attention_mask: Any
    packing: dict[str, Any]
    is_stock: bool
    is_whole: str | None = None
