"""The collectives, by torch's functional ones, which are visible to ``torch.compile``.

torch has no public form of these, so this file alone uses its private module
``torch.distributed._functional_collectives``; ``tests/test_distributed.py`` fails when torch changes it.
"""

import dataclasses
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share one call, by what a compiled graph can hold.

    Attributes:
        group: name of their process group.
        rank: of this process among them.
        size: how many they are.
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
            raise ValueError("group must hold this process, got a group of others")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
        return cls(group.group_name, group.rank(), group.size())


def all_to_all(x: Tensor, received: list[int], sent: list[int], ranks: Ranks) -> Tensor:
    """Sends each rank its part of a flat tensor; without gradients.

    Args:
        x: ``(entries,)``, contiguous: what goes to rank 0, to rank 1 and so on.
        received: entries that come from each rank.
        sent: entries that go to each rank.
        ranks: all of them call this.

    Returns:
        What came from rank 0, from rank 1 and so on.
    """
    # Waited for here: each operation on a tensor that is still waited for costs the host some 0.1 ms.
    return functional.wait_tensor(functional.all_to_all_single(x, received, sent, ranks.group))  # pyright: ignore[reportArgumentType]


def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """The sum (``"sum"``) or the largest (``"max"``) over a group's ranks of each entry; without gradients."""
    return functional.wait_tensor(functional.all_reduce(x, operation, group))  # pyright: ignore[reportArgumentType]
