"""Packed rows: one row per (query, chosen group), placed so that every tile of rows sees one group of keys.

Where neighbouring queries choose different groups, a tile of neighbouring queries must run nearly everywhere. Packed
rows turn this around: the queries that chose a group stand together, a tile of them sees only that group, and a query
merges its rows by their log-sum-exp.

    plan_rows      choices -> which query each row holds, and which rows each query has
    row_mask       plan and slots -> the BlockMask of rows x slots, for flex_attention itself   (row_mask.py)
    attend_packed  plan, attention and merge in one differentiable step      (grouped.py)
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from block_masks.checks import check_positive, check_tensor, check_tile_size

TILE = 128


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where the rows of some heads lie. All tensors are on the device; nothing is read back.

    H heads, in sections of a few that are worked on together, S queries, G groups. A row is counted within its section.
    A pool is a (head, group), ``h * G + g``; its rows fill whole tiles.

    Attributes:
        row_query: int32 ``(sections, rows)``, the query ``h * S + s`` of each row, -1 in padding rows.
        row_pool: int32 ``(sections, row tiles)``, the pool of each tile of rows, -1 in unused tiles.
        query_rows: int32 ``(H, G, S)``, the rows of each query in the order of their groups: ``query_count`` of them,
            and anything after them. If trimmed, G is the most rows of a query.
        query_count: int32 ``(H, S)``, rows of each query; -1 where not all of them have room.
        first_tile: int32 ``(H * G,)``, the first tile of each pool.
        tiles: int32 ``(H * G,)``, tiles of each pool.
        tile_size: rows in a tile.
    """

    row_query: Tensor
    row_pool: Tensor
    query_rows: Tensor
    query_count: Tensor
    first_tile: Tensor
    tiles: Tensor
    tile_size: int

    @property
    def tensors(self) -> list[Tensor]:
        """As ops take them; ``RowPlan(*tensors, tile_size)`` takes them back."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)[:-1]]

    @property
    def heads(self) -> int:
        """Heads in a section."""
        return len(self.query_count) // len(self.row_pool)

    @property
    def row_tiles(self) -> int:
        """Tiles of rows that a section has room for."""
        return self.row_pool.shape[1]

    def trimmed(self, most: int) -> Self:
        """The same plan in less memory, where no query has more than ``most`` rows; one that has comes out as NaN."""
        listed = self.query_rows[:, :most].contiguous()
        return dataclasses.replace(
            self, query_rows=listed, query_count=torch.where(self.query_count > most, -1, self.query_count)
        )


def plan_rows(selected: Tensor, row_tiles: int, heads: int | None = None, tile_size: int = TILE) -> RowPlan:
    """Plans the rows of some heads.

    Args:
        selected: bool ``(H, S, G)``: which groups each query chose; fastest where S is contiguous.
        row_tiles: tiles of rows to make room for in a section: at least the sum over its pools of
            ``ceil(queries that chose the group / tile_size)``. Pairs beyond it have no row, so it must be a bound.
        heads: heads in a section, a divisor of H; all by default.
        tile_size: rows in a tile.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if ``selected`` has no head, no group or another number of dims, a number is below 1, or ``heads``
            does not divide H.
    """
    check_tensor("selected", selected, "bool", ("H", "S", "G"))
    if not selected.shape[0] or not selected.shape[2]:
        raise ValueError(f"selected must have heads and groups, got shape {tuple(selected.shape)}")
    check_positive("row_tiles", row_tiles)
    check_tile_size(tile_size)
    together = selected.shape[0] if heads is None else heads
    check_positive("heads", together)
    if selected.shape[0] % together:
        raise ValueError(f"heads must divide selected's {selected.shape[0]} heads, got {together}")
    plan = _plan_on_gpu if selected.is_cuda else _plan
    return RowPlan(*plan(selected, row_tiles, together, tile_size), tile_size=tile_size)


def _plan(selected: Tensor, row_tiles: int, heads: int, tile_size: int) -> list[Tensor]:
    total, queries, groups = selected.shape
    device, sections = selected.device, total // heads
    chosen = selected.mT
    rank = chosen.cumsum(-1, dtype=torch.int32)
    first, tiles = _pool_tiles(rank[..., -1].flatten(), sections, row_tiles, tile_size)
    row = rank - 1 + (first * tile_size).view(total, groups, 1)
    lost = (chosen & (row >= row_tiles * tile_size)).any(1)
    chosen = chosen & (row < row_tiles * tile_size)
    # Pairs that were not chosen write to one more row, which is cut off.
    rows = row_tiles * tile_size
    section = torch.arange(total, device=device).view(-1, 1, 1) // heads
    index = torch.where(chosen, section * (rows + 1) + row, section * (rows + 1) + rows).flatten()
    query = torch.arange(total * queries, dtype=torch.int32, device=device).view(total, 1, queries).expand_as(row)
    row_query = torch.full((sections * (rows + 1),), -1, dtype=torch.int32, device=device)
    row_query = row_query.scatter_(0, index, query.flatten()).view(sections, rows + 1)[:, :rows].contiguous()
    first_rows = row_query.view(sections, row_tiles, tile_size)[..., 0]
    tile = torch.arange(row_tiles, device=device).expand(sections, -1).contiguous()
    ends = (first + tiles).view(sections, -1).long()
    pool = torch.searchsorted(ends, tile, right=True) + torch.arange(sections, device=device)[:, None] * ends.shape[1]
    row_pool = torch.where(first_rows >= 0, pool, -1).int()
    count = chosen.sum(1, dtype=torch.int32).masked_fill(lost, -1)
    order = (~chosen).byte().sort(dim=1, stable=True).indices
    return [row_query, row_pool, row.gather(1, order).int(), count, first, tiles]


def _plan_on_gpu(selected: Tensor, row_tiles: int, heads: int, tile_size: int) -> list[Tensor]:
    from block_masks.plans import plan_kernels

    sections = selected.shape[0] // heads
    counted = plan_kernels.count_pairs(selected).cumsum(1, dtype=torch.int32)
    first, tiles = plan_kernels.pool_tiles(counted, sections, row_tiles, tile_size)
    return [*plan_kernels.place_rows(selected, counted, first, row_tiles, heads, tile_size), first, tiles]


def _pool_tiles(pairs: Tensor, sections: int, row_tiles: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """The first tile of each pool within its section, and how many it has, both int32 ``(pools,)``."""
    tiles = (pairs + (tile_size - 1)) // tile_size
    ends = tiles.view(sections, -1).cumsum(1, dtype=torch.int32).flatten()
    first = (ends - tiles).clamp(max=row_tiles)
    return first, ends.clamp(max=row_tiles) - first
