"""Collectives that ``torch.compile`` can trace.

They are torch's functional ones, which have no public form: only this file uses the private module
``torch.distributed._functional_collectives``, and ``tests/test_distributed.py`` fails when torch changes it.
"""

import dataclasses
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share one call, as constants of a compiled graph.

    Attributes:
        group: name of their process group.
        rank: of this process in the group.
        size: of the group.
    """

    group: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Self:
        """The ranks of a ``ProcessGroup`` or of a ``DeviceMesh`` with one dim.

        Raises:
            TypeError: if ``group`` is neither.
            ValueError: if the mesh has more dims, or this process is not in the group.
        """
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must have one dim if it is a DeviceMesh, got {group.ndim}: pass mesh['name']")
            group = group.get_group()
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must contain this process, got a group without it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        return cls(group.group_name, group.rank(), group.size())


def all_to_all(x: Tensor, received: list[int], sent: list[int], ranks: Ranks) -> Tensor:
    """What every rank sent to this one; without gradients.

    Args:
        x: ``(entries,)``, contiguous: the entries for rank 0, for rank 1 and so on.
        received: number of entries from each rank.
        sent: number of entries for each rank.
        ranks: that all call this.

    Returns:
        ``(sum of received,)``: the entries from rank 0, from rank 1 and so on.
    """
    # Wait here: each operation on a tensor that is not waited for costs the host about 0.1 ms.
    return functional.wait_tensor(functional.all_to_all_single(x, received, sent, ranks.group))  # pyright: ignore[reportArgumentType]


def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """Each entry's sum (``"sum"``) or maximum (``"max"``) over the ranks of a group; without gradients."""
    return functional.wait_tensor(functional.all_reduce(x, operation, group))  # pyright: ignore[reportArgumentType]
