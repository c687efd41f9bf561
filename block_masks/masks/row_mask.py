"""Which slots of keys each tile of packed rows attends, as a ``BlockMask``."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.checks import check_is
from block_masks.plans.rows import RowPlan
from block_masks.plans.section import sections_of
from block_masks.plans.slots import Slots


def row_mask(plan: RowPlan, slots: Slots, section: int = 0) -> BlockMask:
    """Builds the mask in which each row of a section attends the keys of its group.

    Args:
        plan: of the rows.
        slots: of the keys, the same in every head; the h-th head of a section holds the slots from ``h * slots`` on.
        section: which section's rows.

    Returns:
        A ``BlockMask`` of shape ``(1, 1, rows, heads of the section * slots)`` whose ``mask_mod`` says
        everything by itself. Padding rows attend what their tile attends.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there is no such section.
    """
    check_is("plan", plan, RowPlan, "plan_rows")
    check_is("slots", slots, Slots, "plan_slots")
    if isinstance(section, bool) or not isinstance(section, int):
        raise TypeError(f"section must be an int, got {section!r}")
    if not 0 <= section < len(plan.row_pool):
        raise ValueError(f"section must lie in 0..{len(plan.row_pool) - 1}, got {section}")
    rows = sections_of(plan, slots, None)[section]
    tile, groups, heads, head_slots = plan.tile_size, rows.groups, rows.heads, len(slots.slot_key)
    device = plan.row_pool.device
    partial, partial_list, full, full_list = rows.key_tile_lists()
    # Row tiles of each key tile: one contiguous range, full or partial like the key tile.
    head = rows.first_head + torch.arange(heads, device=device)[:, None]
    pools = (head * groups + slots.tile_group).flatten()
    is_partial = (slots.tile_keys < tile).repeat(heads)
    counts = plan.tiles[pools]
    most = -(-plan.query_rows.shape[-1] // tile)
    row_tiles = plan.row_pool.shape[1]
    ranges = (plan.first_tile[pools][:, None] + torch.arange(most, device=device)).clamp(max=row_tiles - 1)
    of_keys = torch.where(is_partial, counts, 0), ranges, torch.where(is_partial, 0, counts), ranges
    lists = [partial, partial_list, full, full_list, *of_keys]
    row_pool, first_pool = rows.row_pool, rows.of_pools.start
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
