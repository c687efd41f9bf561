"""A ``BlockMask`` in which each query attends the keys of the groups that it chose."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.checks import check_device, check_shape, check_tensor, check_tile_size
from block_masks.launching.transforms import can_read
from block_masks.masks.pairs import pair_lookup
from block_masks.masks.realize import realize
from block_masks.masks.tile_map import TileMap, block_mask_from_tiles


def _check(selected: Any, key_group: Any, tile_size: Any, key_valid: Any) -> None:
    check_tensor("selected", selected, "bool", ("B", "H", "queries", "G"))
    check_tensor("key_group", key_group, "int", ("keys",))
    check_device("key_group", key_group, selected, "selected's")
    check_tile_size(tile_size)
    if not selected.numel() or not key_group.numel():
        raise ValueError(
            f"selected and key_group must not be empty, got shapes {tuple(selected.shape)} and {tuple(key_group.shape)}"
        )
    groups = selected.shape[-1]
    if can_read(key_group) and not 0 <= int(key_group.min()) <= int(key_group.max()) < groups:
        raise ValueError(f"key_group must lie in 0..G - 1 = 0..{groups - 1}, got {key_group.tolist()}")
    if key_valid is None:
        return
    check_tensor("key_valid", key_valid, "bool", ("B", "keys"))
    check_shape("key_valid", key_valid, (selected.shape[0], key_group.shape[0]), "selected and key_group")
    check_device("key_valid", key_valid, selected, "selected's")


def group_tiles(selected: Tensor, key_group: Tensor, tile_size: int = 128, key_valid: Tensor | None = None) -> TileMap:
    """Finds the tiles that must run, and which of them need no mask.

    Works on tiles x groups and tiles x tiles, never on queries x keys. Groups may lie anywhere: straddle tiles, be
    scattered over them, or be absent.

    Args:
        selected: bool ``(B, H, queries, G)``: which groups each query attends.
        key_group: int ``(keys,)``: the group in ``[0, G)`` of each key.
        tile_size: queries, and keys, in a tile.
        key_valid: as ``group_mask``.

    Raises:
        TypeError: as ``group_mask``.
        ValueError: as ``group_mask``.
    """
    _check(selected, key_group, tile_size, key_valid)
    queries, groups = selected.shape[-2:]
    keys = key_group.shape[0]
    padded = F.pad(selected, (0, 0, 0, -queries % tile_size)).unflatten(-2, (-1, tile_size))
    # A tile of keys lacks group -1, which pads the last one. The comparison is spelled out because a compiled scatter
    # of a constant by an integer-divided index has read out of bounds on GPUs.
    padded_group = F.pad(key_group, (0, -keys % tile_size), value=-1).view(-1, tile_size, 1)
    of_group = padded_group == torch.arange(groups, device=key_group.device)
    whole = torch.arange(len(padded_group), device=key_group.device) < keys // tile_size
    if key_valid is not None:  # by sample, and the same in each head
        live = F.pad(key_valid, (0, -keys % tile_size)).unflatten(-1, (-1, tile_size))[:, None]
        of_group, whole = of_group & live[..., None], whole & live.all(-1)[:, :, None]
    holds = of_group.any(-2).to(torch.float32).mT
    # Counts of groups are at most G: exact in float32, and in the reduced precisions that a matmul may choose.
    hits = padded.any(-2).to(torch.float32) @ holds
    misses = (~padded.all(-2)).to(torch.float32) @ holds
    return TileMap(some=hits > 0, every=(misses == 0) & whole)


def group_mask(
    selected: Tensor, key_group: Tensor, *, tile_size: int = 128, key_valid: Tensor | None = None
) -> BlockMask:
    """Builds the mask ``selected[b, h, q, key_group[k]]`` as a ``BlockMask``.

    No tensor of size queries x keys is made and nothing is read back to the host; inside ``torch.compile`` the whole
    construction becomes part of the graph.

    Args:
        selected: bool ``(B, H, queries, G)``: which groups each query attends.
        key_group: int ``(keys,)``: the group in ``[0, G)`` of each key.
        tile_size: queries, and keys, in a tile. Compiled kernels on Hopper GPUs need a multiple of 128.
        key_valid: bool ``(B, keys)``: False at keys that nobody attends, such as padding; all True if None.

    Returns:
        A ``BlockMask`` of shape ``(B, H, queries, keys)`` whose ``mask_mod`` says everything by itself.

    Raises:
        TypeError: if ``selected`` is not bool, ``key_group`` not an integer tensor, or ``tile_size`` not an int.
        ValueError: if a shape, device or ``tile_size`` does not fit, or ``selected`` is too large to index, see
            ``pair_lookup``; on a CPU also if a group is out of range.
    """
    tiles = group_tiles(selected, key_group, tile_size, key_valid)
    chosen = pair_lookup(selected)
    group = realize(key_group.to(torch.int32))
    live = None if key_valid is None else realize(key_valid)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        attended = chosen(b, h, q_idx, group[kv_idx])
        return attended if live is None else attended & live[b, kv_idx]

    lengths = (selected.shape[-2], key_group.shape[0])
    return block_mask_from_tiles(tiles, mask_mod, lengths, (tile_size, tile_size))
