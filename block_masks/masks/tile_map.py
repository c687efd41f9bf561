"""From bool maps over tiles to the eight index tensors of a ``BlockMask``."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.checks import check_is, check_positive, check_tensor
from block_masks.launching.device import on_device

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TileMap:
    """Which tiles must run, and which of them need no mask.

    Attributes:
        some: bool ``(B, H, query tiles, key tiles)``, True where at least one pair of the tile is attended.
        every: the same shape, True where the tile is whole (not cut by the end of the sequence) and all its pairs are
            attended. A subset of ``some``.
    """

    some: Tensor
    every: Tensor


def tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Lists the True columns of each row, in rising order and without duplicates.

    The tail of a list holds the False columns, also in rising order, so that each list is a permutation of the
    columns and any entry is safe to read: the same lists as ``create_block_mask`` makes by a stable sort.

    Args:
        tiles: bool ``(..., rows, columns)``.

    Returns:
        counts, int32 ``(..., rows)``, and columns, int32 ``(..., rows, columns)``, both contiguous.

    Raises:
        TypeError: if ``tiles`` is no dense bool tensor.
        ValueError: if it has fewer than two dims.
    """
    check_tensor("tiles", tiles, "bool")
    if tiles.dim() < 2:
        raise ValueError(f"tiles must have at least 2 dims (rows, columns), got shape {tuple(tiles.shape)}")
    return _tile_lists(tiles)


# Opaque to Inductor, whose scans on torch 2.11 fail to compile when fused with what makes the tile map.
@torch.library.custom_op("block_masks::tile_lists", mutates_args=())
def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    seen = tiles.cumsum(-1)
    counts = seen[..., -1:]
    columns = torch.arange(tiles.shape[-1], device=tiles.device)
    # A False column goes after all True ones, after the False columns to its left.
    place = torch.where(tiles, seen - 1, counts + columns - seen)
    listed = torch.zeros(tiles.shape, dtype=torch.int32, device=tiles.device)
    listed.scatter_(-1, place, columns.to(torch.int32).expand(tiles.shape))
    return counts.squeeze(-1).to(torch.int32), listed


@_tile_lists.register_kernel("cuda")
@on_device
def _(tiles: Tensor) -> tuple[Tensor, Tensor]:
    from block_masks.masks import list_kernels

    return list_kernels.list_tiles(tiles)


@_tile_lists.register_fake
def _(tiles: Tensor) -> tuple[Tensor, Tensor]:
    return tiles.new_empty(tiles.shape[:-1], dtype=torch.int32), tiles.new_empty(tiles.shape, dtype=torch.int32)


def block_mask_from_tiles(
    tiles: TileMap, mask_mod: MaskMod, lengths: tuple[int, int], tile_size: tuple[int, int]
) -> BlockMask:
    """Builds a ``BlockMask`` with all eight index tensors, without ``create_block_mask`` and without a host read.

    Args:
        tiles: the tiles to run, maps of shape ``(B, H, query tiles, key tiles)``.
        mask_mod: says for each pair whether it is attended. It must be right on its own, also outside the tiles that
            run: eager ``flex_attention`` and some backends look at nothing else. Tensors that it captures must be
            realised, see ``realize``.
        lengths: queries and keys in tokens.
        tile_size: queries and keys in one tile.

    Returns:
        A ``BlockMask`` of shape ``(B, H, *lengths)``.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a length or size is below 1.
    """
    check_is("tiles", tiles, TileMap)
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function, got {type(mask_mod).__name__}")
    for name, pair in (("lengths", lengths), ("tile_size", tile_size)):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{name} must be a tuple of 2 ints, got {pair!r}")
        for each in pair:
            check_positive(name, each)
    return BlockMask(lengths, *map_lists(tiles), BLOCK_SIZE=tile_size, mask_mod=mask_mod)


def map_lists(tiles: TileMap) -> list[Tensor]:
    """The eight index tensors of a ``BlockMask``: counts and lists of partial and of full tiles, and transposed."""
    partial = tiles.some & ~tiles.every
    maps = partial, tiles.every, partial.transpose(-1, -2), tiles.every.transpose(-1, -2)
    return [x for one in maps for x in tile_lists(one)]
