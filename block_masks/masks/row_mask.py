"""Which slots of keys each tile of packed rows attends, as lists and as a ``BlockMask``."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.plans.rows import RowPlan
from block_masks.plans.slots import Slots


def row_mask(plan: RowPlan, slots: Slots, section: int = 0) -> BlockMask:
    """Builds the mask in which each row of a section attends the keys of its group.

    Args:
        plan: of the rows.
        slots: of the keys, the same in every head; the h-th head of a section holds the slots from ``h * slots`` on.
        section: which section's rows.

    Returns:
        A ``BlockMask`` of shape ``(1, 1, rows, heads of the section * slots)`` whose ``mask_mod`` alone says
        everything. Padding rows attend what their tile attends.
    """
    tile, groups, head_slots = plan.tile_size, len(slots.group_lengths), len(slots.slot_key)
    heads = len(plan.query_count) // len(plan.row_pool)
    device = plan.row_pool.device
    pool_lengths = slots.group_lengths.repeat(len(plan.query_count))
    cut, cut_list, full, full_list = key_tile_lists(plan, slots, pool_lengths, section)
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


def key_tile_lists(
    plan: RowPlan, slots: Slots, pool_lengths: Tensor, section: int, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tiles of slots that each tile of rows attends: those cut short, counted and listed, and the full ones.

    Args:
        plan: of the rows.
        slots: of the keys; the h-th head of the section holds the slots from ``h * slots`` on.
        pool_lengths: int32 ``(H * G,)``, the keys that the rows of each pool attend, the first ones of its group.
        section: which section's rows.
        whole: whether to count padding slots as if they valid a key, so that no tile is cut.

    Returns:
        int32 counts ``(row tiles,)`` and lists ``(row tiles, tiles of the largest group)`` of cut tiles; the same of
        full tiles. Lists can be read to their ends.
    """
    tile, groups, head_tiles = plan.tile_size, len(slots.group_lengths), len(slots.tile_group)
    heads = len(plan.query_count) // len(plan.row_pool)
    used = plan.row_pool[section] >= 0
    pool = torch.where(used, plan.row_pool[section], section * heads * groups)
    keys = pool_lengths[pool]
    if whole:
        keys = -(-keys // tile) * tile
    pool = pool - section * heads * groups
    first = slots.first_slot[pool % groups] // tile + pool // groups * head_tiles
    full, cut = torch.where(used, keys // tile, 0), torch.where(used & (keys % tile > 0), 1, 0).int()
    last = heads * head_tiles - 1
    place = torch.arange(-(-max(slots.group_sizes) // tile), dtype=torch.int32, device=used.device)
    full_list = (first[:, None] + place).clamp(max=last)
    cut_list = (first + keys // tile).clamp(max=last)[:, None].expand_as(full_list)
    return cut, cut_list, full, full_list
