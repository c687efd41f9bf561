"""The ranks that share a call, and how they share it."""

import dataclasses
import warnings
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vmoba_flex.checks import check_bool
from vmoba_flex.collectives import Ranks
from vmoba_flex.distributed.balance import HeadBalance
from vmoba_flex.distributed.shards import TokenShards


@dataclasses.dataclass(frozen=True)
class RankGroup:
    """The ranks that share a call, and how they share it: ``vmoba_attention(..., group=RankGroup(group, ...))``.

    Attributes:
        group: the ranks: a process group, or a device mesh with one dim.
        shards: which tokens each rank holds; by default consecutive ones, as ``torch.tensor_split`` divides them.
        balance: which heads each rank attends, by their density; by default as many on each rank.
        check: whether ranks first compare what they mean by the call, and all raise if they disagree. It costs one
            collective of 2 KiB for each rank and a host read, and does not work inside ``torch.compile``.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the mesh has more dims, or this process is not in the group.
    """

    group: ProcessGroup | DeviceMesh
    shards: TokenShards | None = dataclasses.field(default=None, kw_only=True)
    balance: HeadBalance | None = dataclasses.field(default=None, kw_only=True)
    check: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _ = self.ranks
        if self.shards is not None and not isinstance(self.shards, TokenShards):
            raise TypeError(f"shards must be a TokenShards or None, got {type(self.shards).__name__}")
        if self.balance is not None and not isinstance(self.balance, HeadBalance):
            raise TypeError(f"balance must be a HeadBalance or None, got {type(self.balance).__name__}")
        check_bool("check", self.check)

    @property
    def ranks(self) -> Ranks:
        """The ranks, as a compiled graph holds them."""
        return Ranks.of(self.group)


def with_old_keywords(group: Any, old: dict[str, Any]) -> RankGroup | None:
    """The group with keywords that ``vmoba_attention`` took next to it before; for one version, with a warning.

    Raises:
        TypeError: if a keyword is none of them.
        ValueError: if ``group`` is None and a keyword asks for one.
    """
    new = {"shards": "shards", "balance": "balance", "check_ranks": "check"}
    for name in old:
        if name not in new:
            raise TypeError(f"vmoba_attention() got an unexpected keyword argument {name!r}")
        if not torch.compiler.is_compiling():  # a graph cannot warn
            message = f"{name} of vmoba_attention is deprecated: pass group=RankGroup(group, {new[name]}=...)"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
    if group is not None:
        changes = {new[name]: value for name, value in old.items()}
        return dataclasses.replace(group if isinstance(group, RankGroup) else RankGroup(group), **changes)
    for name, value in old.items():
        if value:
            raise ValueError(f"group must be given with {name}, got None")
    return None
