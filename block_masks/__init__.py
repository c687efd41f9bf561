"""BlockMasks for FlexAttention, built from per-query choices of key groups.

A *tile* here is one ``BLOCK_SIZE`` rectangle of queries x keys, what PyTorch calls a "block" of a ``BlockMask``.
The package knows tiles and ``BlockMask``; it knows nothing of video or of how a choice was made, and imports
torch only.
"""

from block_masks.attention.coarse_attention import merge_coarse_keys
from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.attention.grouped import RowBound, attend_packed
from block_masks.attention.slot_attention import attend_slots, key_lists
from block_masks.masks.group_mask import group_mask, group_tiles
from block_masks.masks.pairs import pack_bits, pair_lookup
from block_masks.masks.realize import realize
from block_masks.masks.row_mask import row_mask
from block_masks.masks.slot_mask import SlotLists, slot_lists, slot_mask, slot_tile_map, valid_slots
from block_masks.masks.tile_map import TileMap, block_mask_from_tiles, tile_lists
from block_masks.plans.moves import from_slots, to_slots
from block_masks.plans.rows import RowPlan, plan_rows
from block_masks.plans.slots import Slots, plan_slots

__all__ = [
    "CoarseKeys",
    "RowBound",
    "RowPlan",
    "SlotLists",
    "Slots",
    "TileMap",
    "attend_packed",
    "attend_slots",
    "block_mask_from_tiles",
    "from_slots",
    "group_mask",
    "group_tiles",
    "key_lists",
    "merge_coarse_keys",
    "pack_bits",
    "pair_lookup",
    "plan_rows",
    "plan_slots",
    "realize",
    "row_mask",
    "slot_lists",
    "slot_mask",
    "slot_tile_map",
    "tile_lists",
    "to_slots",
    "valid_slots",
]
