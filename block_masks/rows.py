"""Packed rows: one row per (query, chosen group), placed so that every tile of rows sees one group of keys.

Where neighbouring queries choose different groups, a tile of neighbouring queries must run nearly everywhere. Packed
rows turn this around: the queries that chose a group stand together, a tile of them sees that group alone, and a query
merges its rows by their log-sum-exp.

    plan_rows      choices -> which query each row holds, and which rows each query has
    row_mask       plan and slots -> the BlockMask of rows x slots
    attend_packed  plan, attention and merge in one differentiable step      (packed.py)
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.slots import Slots

TILE = 128


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where the rows of some heads lie. All tensors are on the device; nothing is read back.

    H heads, in sections of a few that are worked on together, S queries, G groups. A row is counted within its section.
    A pool is a (head, group), ``h * G + g``; its rows fill whole tiles.

    Attributes:
        row_query: int32 ``(sections, rows)``, the query ``h * S + s`` of each row, -1 in rows that only fill a tile.
        row_pool: int32 ``(sections, row tiles)``, the pool of each tile of rows, -1 in unused tiles.
        query_rows: int32 ``(H, G, S)``, the rows of each query in the order of their groups: ``query_count`` of them,
            and anything behind.
        query_count: int32 ``(H, S)``, rows of each query.
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


def plan_rows(selected: Tensor, row_tiles: int, heads: int | None = None, tile_size: int = TILE) -> RowPlan:
    """Plans the rows of some heads.

    Args:
        selected: bool ``(H, S, G)``: which groups each query chose; fastest where S is contiguous.
        row_tiles: tiles of rows to make room for in a section: at least the sum over its pools of
            ``ceil(queries that chose the group / tile_size)``. Pairs beyond it would be lost, so it must be a bound.
        heads: heads in a section, a divisor of H; all by default.
        tile_size: rows in a tile.
    """
    heads = heads or selected.shape[0]
    plan = _plan_on_gpu if selected.is_cuda else _plan
    return RowPlan(*plan(selected, row_tiles, heads, tile_size), tile_size)


def _plan(selected: Tensor, row_tiles: int, heads: int, tile_size: int) -> list[Tensor]:
    total, queries, groups = selected.shape
    device, sections = selected.device, total // heads
    chosen = selected.mT
    rank = chosen.cumsum(-1, dtype=torch.int32)
    first, tiles = _pool_tiles(rank[..., -1].flatten(), sections, tile_size)
    row = rank - 1 + (first * tile_size).view(total, groups, 1)
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
    order = (~chosen).byte().sort(dim=1, stable=True).indices
    return [row_query, row_pool, row.gather(1, order).int(), chosen.sum(1, dtype=torch.int32), first, tiles]


def _plan_on_gpu(selected: Tensor, row_tiles: int, heads: int, tile_size: int) -> list[Tensor]:
    from block_masks import row_kernels

    sections = selected.shape[0] // heads
    counts = row_kernels.count_pairs(selected)
    before = counts.cumsum(1, dtype=torch.int32)
    first, tiles = _pool_tiles(before[:, -1], sections, tile_size)
    before -= counts
    placed = row_kernels.place_rows(selected, before, first, row_tiles, heads, tile_size)
    return [*placed, first, tiles]


def _pool_tiles(pairs: Tensor, sections: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """The first tile of each pool within its section, and how many it has, both int32 ``(pools,)``."""
    tiles = (pairs + (tile_size - 1)) // tile_size
    ends = tiles.view(sections, -1).cumsum(1, dtype=torch.int32).flatten()
    return ends - tiles, tiles


def row_mask(plan: RowPlan, slots: Slots, section: int = 0) -> BlockMask:
    """Builds the mask in which each row of a section attends the keys of its group.

    Args:
        plan: of the rows.
        slots: of the keys, the same in every head; the h-th head of a section holds the slots from ``h * slots`` on.
        section: which section's rows.

    Returns:
        A ``BlockMask`` of shape ``(1, 1, rows, heads of the section * slots)`` whose ``mask_mod`` alone says
        everything. Rows that fill a tile attend what their tile attends.
    """
    tile, groups, head_slots = plan.tile_size, len(slots.group_keys), len(slots.slot_key)
    heads = len(plan.query_count) // len(plan.row_pool)
    device = plan.row_pool.device
    cut, cut_list, full, full_list = key_tile_lists(plan, slots, section)
    # Row tiles of each key tile: one contiguous range, full or cut like the key tile.
    head = section * heads + torch.arange(heads, device=device)[:, None]
    pools = (head * groups + slots.tile_group).flatten()
    is_cut = (slots.tile_keys < tile).repeat(heads)
    counts = plan.tiles[pools]
    most = -(-plan.query_rows.shape[-1] // tile)
    row_tiles = plan.row_pool.shape[1]
    ranges = (plan.first_tile[pools][:, None] + torch.arange(most, device=device)).clamp(max=row_tiles - 1)
    lists = [
        cut, cut_list, full, full_list, torch.where(is_cut, counts, 0), ranges, torch.where(is_cut, 0, counts), ranges,
    ]  # fmt: skip
    row_pool, first_pool = plan.row_pool[section], section * heads * groups
    slot_group = slots.slot_group

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        of_row, of_slot = row_pool[q // tile], slot_group[kv % head_slots]
        return (of_slot >= 0) & (of_row == first_pool + kv // head_slots * groups + of_slot)

    return BlockMask(
        (row_tiles * tile, heads * head_slots),
        # Kernels read both members of a pair of lists with one stride, so each is a tensor of its own.
        *(x[None, None].int().clone(memory_format=torch.contiguous_format) for x in lists),
        BLOCK_SIZE=(tile, tile),
        mask_mod=mask_mod,
    )


def key_tile_lists(plan: RowPlan, slots: Slots, section: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tiles of slots that each tile of rows attends: those cut short, counted and listed, and the full ones.

    Args:
        plan: of the rows.
        slots: of the keys; the h-th head of the section holds the slots from ``h * slots`` on.
        section: which section's rows.

    Returns:
        int32 counts ``(row tiles,)`` and lists ``(row tiles, tiles of the largest group)`` of cut tiles; the same of
        full tiles. Lists can be read to their ends.
    """
    tile, groups, head_tiles = plan.tile_size, len(slots.group_keys), len(slots.tile_group)
    heads = len(plan.query_count) // len(plan.row_pool)
    used = plan.row_pool[section] >= 0
    pool = plan.row_pool[section].clamp(min=0) - section * heads * groups
    pool = torch.where(used, pool, 0)
    keys = slots.group_keys[pool % groups]
    first = slots.first_slot[pool % groups] // tile + pool // groups * head_tiles
    full, cut = torch.where(used, keys // tile, 0), torch.where(used & (keys % tile > 0), 1, 0).int()
    last = heads * head_tiles - 1
    place = torch.arange(-(-max(slots.group_sizes) // tile), dtype=torch.int32, device=used.device)
    full_list = (first[:, None] + place).clamp(max=last)
    cut_list = (first + keys // tile).clamp(max=last)[:, None].expand_as(full_list)
    return cut, cut_list, full, full_list
