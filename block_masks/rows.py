"""Packed rows: one row per (query, chosen group), gathered so that every tile that runs is useful.

Where neighbouring queries choose different groups, a tile of neighbouring queries must run nearly everywhere. Packed
rows turn this around: the queries that chose a group stand together, a tile of them sees that group alone, and a query
merges its rows by their log-sum-exp.

    plan_rows     choices -> where each pair's row is, and the BlockMask of rows x keys
    gather_rows   queries -> rows                                    (row_ops.py)
    pad_keys      keys or values -> slots, each group in whole tiles
    flex_attention(rows, slots, ..., block_mask=plan.block_mask)
    merge_rows    outputs and log-sum-exps of rows -> output         (row_ops.py)
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

TILE = 128


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where the rows and key slots of some heads lie. All tensors are on the device; nothing is read back.

    H heads, S queries, G groups; a head's keys take ``slots`` slots, each group whole tiles of them.

    Attributes:
        row_query: int32 ``(rows,)``, the query ``h * S + s`` of each row, -1 in rows that only fill a tile.
        pair_row: int32 ``(H, G, S)``, the row of each chosen pair, -1 where the group was not chosen.
        slot_key: int64 ``(slots,)``, the key in each slot, -1 in slots that only fill a tile; the same for all heads.
        key_slot: int64 ``(keys,)``, the slot of each key.
        row_group: int32 ``(row tiles,)``, the ``h * G + g`` of each tile of rows, -2 in unused tiles.
        slot_group: int32 ``(H * slots,)``, the ``h * G + g`` of each slot, -1 in filling ones.
        block_mask: rows x slots, shape ``(1, 1, rows, H * slots)``.
    """

    row_query: Tensor
    pair_row: Tensor
    slot_key: Tensor
    key_slot: Tensor
    row_group: Tensor
    slot_group: Tensor
    block_mask: BlockMask


def slot_tiles(group_sizes: list[int], tile_size: int = TILE) -> list[int]:
    """Tiles of key slots that each group takes."""
    return [-(-size // tile_size) for size in group_sizes]


def plan_rows(
    selected: Tensor, key_group: Tensor, group_sizes: list[int], row_tiles: int, tile_size: int = TILE
) -> RowPlan:
    """Plans the rows of some heads.

    Args:
        selected: bool ``(H, S, G)``: which groups each query chose.
        key_group: int64 ``(keys,)``: the group of each key.
        group_sizes: keys in each group, known on the host.
        row_tiles: tiles of rows to make room for: at least the sum over heads and groups of
            ``ceil(queries that chose the group / tile_size)``. Pairs beyond it would be lost, so it must be a bound.
        tile_size: rows, and keys, in a tile.
    """
    widths = slot_tiles(group_sizes, tile_size)
    tensors = _plan_rows(selected, key_group, row_tiles, sum(widths), max(widths), tile_size)
    row_query, pair_row, slot_key, key_slot, row_group, slot_group = tensors[:6]
    mask = BlockMask(
        (row_tiles * tile_size, selected.shape[0] * sum(widths) * tile_size),
        *tensors[6:],
        BLOCK_SIZE=(tile_size, tile_size),
        mask_mod=lambda b, h, q, kv: row_group[q // tile_size] == slot_group[kv],
    )
    return RowPlan(row_query, pair_row, slot_key, key_slot, row_group, slot_group, mask)


# Opaque to Inductor: it scans, scatters and searches, and its results are captured by a mask_mod.
@torch.library.custom_op("block_masks::plan_rows", mutates_args=())
def _plan_rows(
    selected: Tensor, key_group: Tensor, row_tiles: int, head_slot_tiles: int, max_width: int, tile: int
) -> list[Tensor]:
    heads, queries, groups = selected.shape
    device = selected.device
    group = torch.arange(groups, device=device)
    # Rows: each (head, group) takes whole tiles, one behind the other.
    chosen = selected.transpose(1, 2).contiguous()
    rank = chosen.cumsum(-1, dtype=torch.int32)
    tiles = ((rank[..., -1] + tile - 1) // tile).flatten().long()
    ends = tiles.cumsum(0)
    first = ends - tiles
    pair_row = torch.where(chosen, rank + (first.view(heads, groups, 1) * tile - 1).int(), -1).to(torch.int32)
    row_query = _rows_to_queries(pair_row, row_tiles * tile)
    row_tile = torch.arange(row_tiles, device=device)
    row_group = torch.searchsorted(ends, row_tile, right=True)
    unused = row_group == heads * groups
    # Keys: each group takes whole tiles, in the order of the group ids, the same in every head.
    sizes = (key_group[:, None] == group).sum(0)
    key_tiles = (sizes + tile - 1) // tile
    key_first = key_tiles.cumsum(0) - key_tiles
    order = key_group.argsort(stable=True)
    in_order = key_group[order]
    slot = key_first[in_order] * tile + torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[in_order]
    key_slot = torch.empty_like(order).scatter_(0, order, slot)
    slot_key = torch.full((head_slot_tiles * tile,), -1, device=device).scatter_(0, slot, order)
    slot_tile_group = torch.searchsorted(
        key_first + key_tiles, torch.arange(head_slot_tiles, device=device), right=True
    )
    slot_group = torch.where(
        slot_key >= 0,
        slot_tile_group.repeat_interleave(tile, output_size=head_slot_tiles * tile)
        + torch.arange(heads, device=device)[:, None] * groups,
        -1,
    ).flatten()
    # Lists of key tiles for each row tile: the group's full tiles, and its last one if it is cut short.
    safe = torch.where(unused, 0, row_group)
    head, its_group = safe // groups, safe % groups
    full = torch.where(unused, 0, sizes[its_group] // tile)
    cut = torch.where(unused, 0, (sizes[its_group] % tile > 0).long())
    base = head * head_slot_tiles + key_first[its_group]
    last_tile = heads * head_slot_tiles - 1
    full_list = (base[:, None] + torch.arange(max_width, device=device)).clamp(max=last_tile)
    cut_list = (base + full)[:, None].expand(-1, max_width).clamp(max=last_tile)
    # Lists of row tiles for each key tile: one contiguous range, full or cut like the key tile.
    within = torch.arange(head_slot_tiles, device=device) - key_first[slot_tile_group]
    is_cut = (within == sizes[slot_tile_group] // tile).repeat(heads)
    of_key = (torch.arange(heads, device=device)[:, None] * groups + slot_tile_group).flatten()
    range_list = (first[of_key][:, None] + torch.arange(-(-queries // tile), device=device)).clamp(max=row_tiles - 1)
    lists = [
        cut,
        cut_list,
        full,
        full_list,
        torch.where(is_cut, tiles[of_key], 0),
        range_list,
        torch.where(is_cut, 0, tiles[of_key]),
        range_list,
    ]
    return [
        row_query,
        pair_row,
        slot_key,
        key_slot,
        torch.where(unused, -2, row_group).to(torch.int32),
        slot_group.to(torch.int32),
        # Kernels read both members of a pair of lists with one stride, so each is a tensor of its own.
        *(x[None, None].to(torch.int32).clone(memory_format=torch.contiguous_format) for x in lists),
    ]


def _rows_to_queries(pair_row: Tensor, rows: int) -> Tensor:
    """Inverts ``pair_row (H, G, S)``: the query ``h * S + s`` of each row, int32 ``(rows,)``, -1 in rows without."""
    if pair_row.is_cuda:
        from block_masks import row_kernels

        return row_kernels.rows_to_queries(pair_row, rows)
    heads, _, queries = pair_row.shape
    query = torch.arange(heads * queries, dtype=torch.int32, device=pair_row.device).view(heads, 1, queries)
    # Pairs that were not chosen have row -1: they write to one more row, which is cut off.
    target = torch.full((rows + 1,), -1, dtype=torch.int32, device=pair_row.device)
    index = torch.where(pair_row >= 0, pair_row, rows).flatten().long()
    return target.scatter_(0, index, query.expand_as(pair_row).flatten())[:rows].clone()


@_plan_rows.register_fake
def _(
    selected: Tensor, key_group: Tensor, row_tiles: int, head_slot_tiles: int, max_width: int, tile: int
) -> list[Tensor]:
    heads, queries, groups = selected.shape
    new, slot_tiles, ranges = selected.new_empty, heads * head_slot_tiles, -(-queries // tile)
    shapes = [(row_tiles,), (row_tiles, max_width)] * 2 + [(slot_tiles,), (slot_tiles, ranges)] * 2
    return [
        new(row_tiles * tile, dtype=torch.int32),
        new(heads, groups, queries, dtype=torch.int32),
        new(head_slot_tiles * tile, dtype=torch.int64),
        new(len(key_group), dtype=torch.int64),
        new(row_tiles, dtype=torch.int32),
        new(slot_tiles * tile, dtype=torch.int32),
        *(new(1, 1, *shape, dtype=torch.int32) for shape in shapes),
    ]
