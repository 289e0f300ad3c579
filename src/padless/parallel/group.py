"""The processes that share one sequence: a one-dimensional `DeviceMesh`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from padless.environment import ranks_per_host


@dataclass(frozen=True)
class SequenceGroup:
    """One process's place among those that share a sequence.

    Attributes:
        process_group: torch's.
        rank: of this process in the group.
        size: processes of the group.
    """

    process_group: Any
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        # A copy of a model is of the same group; a process group cannot be copied.
        return self

    @classmethod
    def of(cls, mesh: Any) -> SequenceGroup:
        """Reads a mesh.

        Args:
            mesh: a DeviceMesh of one dimension.

        Raises:
            TypeError: mesh is not a DeviceMesh.
            ValueError: it has another number of dimensions.
            RuntimeError: torch.distributed is not initialised, or this process is not of the mesh.
        """
        if isinstance(mesh, SequenceGroup):
            return mesh
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "sequence_mesh needs torch.distributed to be initialised, and it is not; call "
                "init_process_group() and init_device_mesh() first, and start with torchrun"
            )
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"sequence_mesh must be a torch DeviceMesh, got {type(mesh).__name__}; "
                f"make one with init_device_mesh()"
            )
        if mesh.ndim != 1:
            raise ValueError(
                f"sequence_mesh must have one dimension, got {mesh.ndim}, "
                f"{mesh.mesh_dim_names or 'without names'}; pass one of them, as in "
                f'mesh["sequence"]'
            )
        if mesh.get_coordinate() is None:
            raise RuntimeError(
                f"this process must be one of sequence_mesh, got rank {dist.get_rank()} of "
                f"{mesh.mesh.tolist()}; pass the mesh of the group that it is in"
            )
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    @property
    def is_within_host(self) -> bool:
        """Whether its processes are of one host, as far as torchrun tells; True where it does not.

        Source: torchrun numbers the processes of a host one after the other.
        """
        number = ranks_per_host()
        if number is None:
            return True
        ranks = dist.get_process_group_ranks(self.process_group)
        return len({rank // number for rank in ranks}) == 1

    def meet(self, device: torch.device) -> None:
        """Lets all ranks exchange something, which every one of them has to call.

        NCCL connects a group in its first exchange, which waits for ever for a rank that has no
        part in it.
        """
        dist.all_reduce(torch.zeros(1, device=device), group=self.process_group)

    def agrees(self, answer: bool, device: torch.device) -> bool:
        """Asks whether the answer is True on all ranks, every one of which has to call it."""
        found = torch.tensor(int(answer), device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.process_group)
        return bool(found)

    def neighbour(self, step: int) -> int:
        """Names the global rank of the process that many places further round the group."""
        return dist.get_global_rank(self.process_group, (self.rank + step) % self.size)
