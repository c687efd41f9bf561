"""Which slots each tile of slots attends, as a map of tiles and as a ``BlockMask``.

A tile whose slots all hold a key runs without a mask. Only the last tile of a group can be cut short, and then its
padding slots are masked.
"""

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.masks.pairs import pair_lookup
from block_masks.masks.realize import realize
from block_masks.masks.tile_map import TileMap, block_mask_from_tiles
from block_masks.plans.slots import Slots


def valid_slots(slots: Slots, key_valid: Tensor | None) -> Tensor | None:
    """Which slots hold a key that is attended: bool ``(B, slots)``, of keys ``(B, keys)``; None of None."""
    if key_valid is None:
        return None
    return (slots.slot_key >= 0) & key_valid[:, slots.slot_key.clamp(min=0)]


def slot_tile_map(selected: Tensor, slots: Slots, slot_valid: Tensor | None = None) -> TileMap:
    """Finds the tiles of ``slot_mask`` that must run, and which of them need no mask.

    Args:
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends.
        slots: of these tiles and groups.
        slot_valid: as in ``slot_mask``.
    """
    some = selected.index_select(-1, slots.tile_group)
    full = slots.tile_keys == slots.tile_size
    if slot_valid is not None:
        tiles = slot_valid.unflatten(-1, (-1, slots.tile_size))
        some, full = some & tiles.any(-1)[:, None, None], tiles.all(-1)[:, None, None]
    return TileMap(some, some & full)


def slot_mask(selected: Tensor, slots: Slots, slot_valid: Tensor | None = None) -> BlockMask:
    """Builds the mask in which all slots of a tile attend the keys of the groups that the tile chose.

    A padding slot attends what its tile attends, so that its output is finite, and no slot attends a padding one.

    Args:
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends.
        slots: of these tiles and groups.
        slot_valid: bool ``(B, slots)``: False at slots that nobody attends, the padding ones among them; only these if
            None.

    Returns:
        A ``BlockMask`` of shape ``(B, H, slots, slots)`` whose ``mask_mod`` says everything by itself.
    """
    chosen, group, tile_size = pair_lookup(selected), slots.slot_group, slots.tile_size

    live = None if slot_valid is None else realize(slot_valid)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key_group = group[kv_idx]
        there = key_group >= 0 if live is None else live[b, kv_idx]
        return there & chosen(b, h, q_idx // tile_size, key_group)

    lengths = (len(group), len(group))
    return block_mask_from_tiles(slot_tile_map(selected, slots, slot_valid), mask_mod, lengths, (tile_size, tile_size))
