"""A section: a few heads whose packed rows are worked on together, with all that the steps of attention need of them.

Shapes: ``H`` heads in all, ``G`` groups, ``S`` queries.
"""

import dataclasses

import torch
from torch import Tensor

from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots


@dataclasses.dataclass(frozen=True)
class Section:
    """The rows of heads ``index * heads .. (index + 1) * heads - 1`` and the slots of their keys.

    Attributes:
        plan: of the rows of all heads.
        slots: of the keys, the same in every head.
        pool_lengths: int32 ``(H * G,)``, the keys that the rows of each pool attend, the first ones of its group.
        index: which section.
    """

    plan: RowPlan
    slots: Slots
    pool_lengths: Tensor
    index: int = 0

    @property
    def heads(self) -> int:
        """Heads in a section."""
        return self.plan.heads

    @property
    def groups(self) -> int:
        """G, groups of keys."""
        return len(self.slots.group_lengths)

    @property
    def first_head(self) -> int:
        """The section's first head."""
        return self.index * self.heads

    @property
    def of_heads(self) -> slice:
        """The section's heads among all."""
        return slice(self.first_head, self.first_head + self.heads)

    @property
    def of_pools(self) -> slice:
        """The section's pools ``h * G + g`` among all."""
        return slice(self.first_head * self.groups, (self.first_head + self.heads) * self.groups)

    @property
    def row_query(self) -> Tensor:
        """int32 ``(rows,)``; see ``RowPlan``."""
        return self.plan.row_query[self.index]

    @property
    def row_pool(self) -> Tensor:
        """int32 ``(row tiles,)``; see ``RowPlan``."""
        return self.plan.row_pool[self.index]

    @property
    def query_rows(self) -> tuple[Tensor, Tensor]:
        """The rows of each of the section's queries, ``(heads, G, S)``, and how many, ``(heads, S)``."""
        return self.plan.query_rows[self.of_heads], self.plan.query_count[self.of_heads]

    def key_tile_lists(self, whole: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tiles of slots that each tile of rows attends: the partial ones, counted and listed, and the full ones.

        The h-th head of the section holds the slots from ``h * slots`` on.

        Args:
            whole: whether to count padding slots as keys, so that no tile is partial.

        Returns:
            int32 counts ``(row tiles,)`` and lists ``(row tiles, tiles of the largest group)`` of partial tiles; the
            same of full tiles. Lists can be read to their ends.
        """
        slots, tile, groups = self.slots, self.plan.tile_size, self.groups
        head_tiles = len(slots.tile_group)
        used = self.row_pool >= 0
        pool = torch.where(used, self.row_pool, self.of_pools.start)
        keys = self.pool_lengths[pool]
        if whole:
            keys = -(-keys // tile) * tile
        pool = pool - self.of_pools.start
        first = slots.first_slot[pool % groups] // tile + pool // groups * head_tiles
        full, partial = torch.where(used, keys // tile, 0), torch.where(used & (keys % tile > 0), 1, 0).int()
        last = self.heads * head_tiles - 1
        place = torch.arange(-(-max(slots.group_sizes) // tile), dtype=torch.int32, device=used.device)
        full_list = (first[:, None] + place).clamp(max=last)
        partial_list = (first + keys // tile).clamp(max=last)[:, None].expand_as(full_list)
        return partial, partial_list, full, full_list


def sections_of(plan: RowPlan, slots: Slots, group_lengths: Tensor | None) -> list[Section]:
    """All sections of a plan.

    Args:
        plan: of the rows.
        slots: of the keys.
        group_lengths: int32 ``(H, G)``, the keys of each group that the queries of a head attend; all if None.
    """
    heads = len(plan.query_count)
    lengths = slots.group_lengths.repeat(heads) if group_lengths is None else group_lengths.flatten()
    return [Section(plan, slots, lengths, index) for index in range(len(plan.row_pool))]
