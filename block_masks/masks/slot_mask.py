"""Which slots each tile of slots attends, as a map of tiles and as a ``BlockMask``.

A tile whose slots all hold a key runs without a mask. Only the last tile of a group can be cut short, and then its
padding slots are masked.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.checks import check_device, check_is, check_shape, check_tensor
from block_masks.masks.pairs import pack_bits, pair_lookup, word_lookup
from block_masks.masks.realize import realize
from block_masks.masks.tile_map import TileMap, block_mask_from_tiles, map_lists
from block_masks.plans.slots import Slots


def valid_slots(slots: Slots, key_valid: Tensor | None) -> Tensor | None:
    """Which slots hold a key that is attended: bool ``(B, slots)``, of keys ``(B, keys)``; None of None.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes do not fit.
    """
    check_is("slots", slots, Slots, "plan_slots")
    if key_valid is None:
        return None
    check_tensor("key_valid", key_valid, "bool", ("B", "keys"))
    check_shape("key_valid", key_valid, (key_valid.shape[0], len(slots.key_slot)), "slots")
    check_device("key_valid", key_valid, slots.slot_key, "slots'")
    return (slots.slot_key >= 0) & key_valid[:, slots.slot_key.clamp(min=0)]


def check_slot_choice(selected: Any, slots: Any, slot_valid: Any = None, query_slots: int | None = None) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless these are a choice of tiles of slots, and which slots are valid."""
    check_is("slots", slots, Slots, "plan_slots")
    check_tensor("selected", selected, "bool", ("B", "H", "tiles", "G"))
    tiles = len(slots.tile_group) if query_slots is None else query_slots // slots.tile_size
    groups = len(slots.group_sizes)
    check_shape("selected", selected, (*selected.shape[:2], tiles, groups), "slots")
    check_device("selected", selected, slots.slot_key, "slots'")
    if slot_valid is not None:
        check_tensor("slot_valid", slot_valid, "bool", ("B", "slots"))
        check_shape("slot_valid", slot_valid, (selected.shape[0], len(slots.slot_key)), "selected and slots")
        check_device("slot_valid", slot_valid, slots.slot_key, "slots'")


def slot_tile_map(
    selected: Tensor, slots: Slots, slot_valid: Tensor | None = None, query_slots: int | None = None
) -> TileMap:
    """Finds the tiles of ``slot_mask`` that must run, and which of them need no mask.

    Args:
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends.
        slots: of these tiles and groups.
        slot_valid: as in ``slot_mask``.
        query_slots: as in ``slot_mask``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes do not fit.
    """
    check_slot_choice(selected, slots, slot_valid, query_slots)
    some = selected.index_select(-1, slots.tile_group)
    full = slots.tile_keys == slots.tile_size
    if slot_valid is not None:
        tiles = slot_valid.unflatten(-1, (-1, slots.tile_size))
        some, full = some & tiles.any(-1)[:, None, None], tiles.all(-1)[:, None, None]
    return TileMap(some, some & full)


class SlotLists(NamedTuple):
    """What ``slot_mask`` finds out of a choice, to be found once.

    Attributes:
        words: int64 ``(B, H, tiles, ceil(G / 64))``, the choice in bits.
        lists: the eight index tensors of the mask.
    """

    words: Tensor
    lists: tuple[Tensor, ...]


def slot_lists(selected: Tensor, slots: Slots) -> SlotLists:
    """Of a choice ``(B, H, tiles, G)`` of which all slots with a key are attended.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes do not fit.
    """
    check_slot_choice(selected, slots)
    return SlotLists(pack_bits(selected), tuple(map_lists(slot_tile_map(selected, slots))))


def slot_mask(
    selected: Tensor, slots: Slots, slot_valid: Tensor | None = None, known: SlotLists | None = None,
    query_slots: int | None = None,
) -> BlockMask:  # fmt: skip
    """Builds the mask in which all slots of a tile attend the keys of the groups that the tile chose.

    A padding slot attends what its tile attends, so that its output is finite, and no slot attends a padding one.

    Args:
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends.
        slots: of these tiles and groups.
        slot_valid: bool ``(B, slots)``: False at slots that nobody attends, the padding ones among them; only these if
            None.
        known: ``slot_lists`` of the choice, without ``slot_valid``.
        query_slots: how many slots of other queries the tiles are of; None if they are those of the keys.

    Returns:
        A ``BlockMask`` of shape ``(B, H, query slots, slots)`` whose ``mask_mod`` says everything by itself.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes do not fit, or ``known`` comes with ``slot_valid``.
    """
    check_slot_choice(selected, slots, slot_valid, query_slots)
    if known is not None:
        check_is("known", known, SlotLists, "slot_lists, or None")
        if slot_valid is not None:
            raise ValueError("known must be None with slot_valid, which changes what is attended, got SlotLists")
    chosen = pair_lookup(selected) if known is None else word_lookup(known.words)
    group, tile_size = slots.slot_group, slots.tile_size
    live = None if slot_valid is None else realize(slot_valid)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key_group = group[kv_idx]
        there = key_group >= 0 if live is None else live[b, kv_idx]
        return there & chosen(b, h, q_idx // tile_size, key_group)

    lengths = (query_slots or len(group), len(group))
    if known is not None:
        return BlockMask(lengths, *known.lists, BLOCK_SIZE=(tile_size, tile_size), mask_mod=mask_mod)
    return block_mask_from_tiles(
        slot_tile_map(selected, slots, slot_valid, query_slots), mask_mod, lengths, (tile_size, tile_size)
    )
