"""Slots: keys sorted by group, each group in whole tiles, so that no tile holds keys of two groups.

    plan_slots    the group of each key -> which key is in which slot
    to_slots      keys, values or queries -> slots; from_slots takes them back      (moves.py)

Only the last tile of a group can be cut short; its padding slots hold no key.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from block_masks.checks import check_bool, check_positive, check_tensor, check_tile_size
from block_masks.launching.device import on_device
from block_masks.launching.transforms import can_read
from block_masks.plans.rows import TILE, plan_rows


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where keys lie in slots. All tensors are on the device; nothing is read back.

    Attributes:
        slot_key: int64 ``(slots,)``, the key in each slot, -1 in padding slots. Groups stand in the order
            of their ids, and the keys of a group in their own order.
        key_slot: int64 ``(keys,)``, the slot of each key.
        slot_group: int32 ``(slots,)``, the group of each slot's key, -1 in padding slots.
        tile_group: int64 ``(tiles,)``, the group of each tile of slots.
        tile_keys: int64 ``(tiles,)``, the keys in each tile, ``tile_size`` where it is full and at least 1.
        first_slot: int32 ``(G,)``, the first slot of each group.
        group_lengths: int32 ``(G,)``, the keys in each group.
        tile_size: slots in a tile.
        group_sizes: keys in each group, on the host.
        sorted_keys: whether keys are known to stand in the order of their groups.
    """

    slot_key: Tensor
    key_slot: Tensor
    slot_group: Tensor
    tile_group: Tensor
    tile_keys: Tensor
    first_slot: Tensor
    group_lengths: Tensor
    tile_size: int
    group_sizes: tuple[int, ...]
    sorted_keys: bool = False

    @property
    def flat(self) -> tuple[list[Tensor], list[int], int, bool]:
        """As ops take them; ``Slots.of_flat`` takes them back."""
        tensors = [getattr(self, name) for name in SLOT_TENSORS]
        return tensors, list(self.group_sizes), self.tile_size, self.sorted_keys

    @classmethod
    def of_flat(cls, tensors: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool) -> Self:
        """Slots that an op was given."""
        return cls(*tensors, tile_size=tile_size, group_sizes=tuple(group_sizes), sorted_keys=sorted_keys)

    @property
    def whole(self) -> bool:
        """Whether all groups are whole tiles, so that every slot holds a key."""
        return not any(size % self.tile_size for size in self.group_sizes)

    @property
    def in_place(self) -> bool:
        """Whether each key is known to be in its slot already."""
        return self.sorted_keys and len(self.key_slot) == len(self.slot_key)

    @property
    def placed(self) -> Self:
        """These slots for keys that ``to_slots`` has put there, padding included. Gradients of padding mean nothing."""
        if self.in_place:
            return self
        slot = torch.arange(len(self.slot_key), device=self.slot_key.device)
        return dataclasses.replace(self, slot_key=slot, key_slot=slot, sorted_keys=True)

    def valid(self, group_lengths: Tensor) -> "ValidSlots":
        """What the slots hold where only the first keys of each group are there, int32 ``(rows, G)`` of them."""
        groups, size = self.tile_group, self.tile_size
        first = torch.arange(len(groups), device=groups.device) * size - self.first_slot[groups]
        tile_keys = group_lengths[:, groups] - first
        within = torch.arange(size, device=groups.device)
        return ValidSlots(
            slots=(within < tile_keys[..., None]).flatten(1),
            tiles=tile_keys > 0,
            last=(self.first_slot + group_lengths.clamp(min=1) - 1).long(),
            padding=-group_lengths % size,
        )


@dataclasses.dataclass(frozen=True)
class ValidSlots:
    """Which keys are valid, for each of some rows: samples, heads, or one row for all.

    Attributes:
        slots: bool ``(rows, slots)``, whether the slot holds a valid key.
        tiles: bool ``(rows, tiles)``, whether any slot of the tile does.
        last: int64 ``(rows, G)``, the slot of each group's last one; its first slot if it has none.
        padding: int32 ``(rows, G)``, the other slots of each group's tiles that hold one.
    """

    slots: Tensor
    tiles: Tensor
    last: Tensor
    padding: Tensor

    def slot_key(self, slots: Slots) -> Tensor:
        """As in ``Slots``, but -1 at padding: int64 ``(rows, slots)``."""
        return torch.where(self.slots, slots.slot_key, -1)

    def key_slot(self, slots: Slots) -> Tensor:
        """As in ``Slots``, but -1 for padding: int64 ``(rows, keys)``."""
        return torch.where(self.slots[:, slots.key_slot], slots.key_slot, -1)

    def copied(self, slots: Slots) -> Tensor:
        """Each slot itself, or where it is a padding one, the slot of its group's last key: int64 ``(rows, slots)``."""
        of_slot = torch.arange(len(slots.slot_key), device=self.slots.device)
        last = self.last[:, slots.tile_group].repeat_interleave(slots.tile_size, 1, output_size=len(of_slot))
        return torch.where(self.slots, of_slot, last)


SLOT_TENSORS = [field.name for field in dataclasses.fields(Slots) if field.type is Tensor]


def plan_slots(key_group: Tensor, group_sizes: list[int], tile_size: int = TILE, *, sorted_keys: bool = False) -> Slots:
    """Plans the slots of some keys.

    Args:
        key_group: int64 ``(keys,)``: the group of each key.
        group_sizes: keys in each group, at least one, known on the host.
        tile_size: slots in a tile.
        sorted_keys: whether ``key_group`` is known to rise: keys of whole tiles then are in their slots already, and
            need no copies.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a size is below 1, or the sizes do not sum to the keys, or, on a CPU, are not those of
            ``key_group``. On a GPU its values are not read.
    """
    _check_groups(key_group, group_sizes, tile_size)
    check_bool("sorted_keys", sorted_keys)
    tiles = sum(-(-size // tile_size) for size in group_sizes)
    tensors = _plan_slots(key_group, len(group_sizes), tiles, tile_size)
    return Slots(*tensors, tile_size=tile_size, group_sizes=tuple(group_sizes), sorted_keys=sorted_keys)


def _check_groups(key_group: Any, group_sizes: Any, tile_size: Any) -> None:
    check_tensor("key_group", key_group, "int64", ("keys",))
    check_tile_size(tile_size)
    if not isinstance(group_sizes, list | tuple):
        raise TypeError(f"group_sizes must be a list of ints, got {group_sizes!r}")
    if not group_sizes:
        raise ValueError("group_sizes must have at least one size, got none")
    for size in group_sizes:
        check_positive("group_sizes", size)
    if sum(group_sizes) != len(key_group):
        raise ValueError(f"group_sizes must sum to the {len(key_group)} keys of key_group, got {list(group_sizes)}")
    if can_read(key_group):
        groups = len(group_sizes)
        if not 0 <= int(key_group.min()) <= int(key_group.max()) < groups:
            raise ValueError(
                f"key_group must lie in 0..G - 1 = 0..{groups - 1} by group_sizes, got {key_group.tolist()}"
            )
        found = key_group.bincount(minlength=len(group_sizes)).tolist()
        if found != list(group_sizes):
            raise ValueError(f"group_sizes must be the {found} of key_group, got {list(group_sizes)}")


# Opaque to Inductor: it scans and scatters, and its results are captured by a mask_mod.
@torch.library.custom_op("block_masks::plan_slots", mutates_args=())
def _plan_slots(key_group: Tensor, groups: int, num_tiles: int, tile_size: int) -> list[Tensor]:
    # Slots are the rows of keys that each chose their own group.
    chosen = torch.arange(groups, device=key_group.device)[:, None] == key_group
    plan = plan_rows(chosen.mT[None], num_tiles, tile_size=tile_size)
    slot_key, tile_group = plan.row_query[0], plan.row_pool[0].long()
    of_slot = tile_group[:, None].expand(-1, tile_size).flatten()
    group_lengths = chosen.sum(1, dtype=torch.int32)
    first_slot = plan.first_tile * tile_size
    place = torch.arange(num_tiles, device=key_group.device) * tile_size - first_slot[tile_group]
    return [
        slot_key.long(),
        plan.query_rows[0, 0].long(),
        torch.where(slot_key >= 0, of_slot, -1).int(),
        tile_group,
        (group_lengths[tile_group] - place).clamp(max=tile_size).long(),
        first_slot,
        group_lengths,
    ]


@_plan_slots.register_kernel("cuda")
@on_device
def _(key_group: Tensor, groups: int, num_tiles: int, tile_size: int) -> list[Tensor]:
    from block_masks.plans import plan_kernels

    return plan_kernels.place_keys(key_group.contiguous(), groups, num_tiles, tile_size)


@_plan_slots.register_fake
def _(key_group: Tensor, groups: int, num_tiles: int, tile_size: int) -> list[Tensor]:
    slots, new = num_tiles * tile_size, key_group.new_empty
    return [
        new(slots), new(len(key_group)), new(slots, dtype=torch.int32), new(num_tiles), new(num_tiles),
        new(groups, dtype=torch.int32), new(groups, dtype=torch.int32),
    ]  # fmt: skip
