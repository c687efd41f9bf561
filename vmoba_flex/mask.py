"""A VMoBA selection as a BlockMask."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks import Slots, TileMap, group_mask, group_tiles, plan_slots
from block_masks.rows import TILE
from vmoba_flex.inputs import check_choice, check_positive, check_query_key, check_text_lengths
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection import choose_blocks

TOKEN_ORDERS = ("raster", "block")


def vmoba_mask(
    query: Tensor,
    key: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    token_order: str = "raster",
    tile_size: int = 128,
    text_lengths: Tensor | None = None,
) -> BlockMask:
    """Chooses blocks and returns the choice as a per-head ``BlockMask`` for ``flex_attention``.

    Nothing is read back to the host and no S x S tensor is made. Inside ``torch.compile`` it becomes part of the graph.

    Args:
        query: ``(B, H, S, D)`` in ``token_order``, prefix and suffix included; floating point.
        key: ``(B, key heads, S, D)``; pass ``enable_gqa=True`` to ``flex_attention`` where it has fewer heads.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.
        token_order: the order of the tokens in query, key and value, and so in the mask: ``"raster"`` or ``"block"``
            (see ``BlockPartition.to_block_order``). Block order leaves fewer tiles to run.
        tile_size: FlexAttention's ``BLOCK_SIZE``, for queries and keys. Compiled kernels on Hopper GPUs need a multiple
            of 128.
        text_lengths: as in ``vmoba_attention``.

    Returns:
        A ``BlockMask`` of shape ``(B, H, S, S)``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.

    Example:
        >>> import torch
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> from vmoba_flex import BlockPartition, TopK, vmoba_mask
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatial((4, 8, 8), (4, 4))
        >>> flex_attention(q, k, v, block_mask=vmoba_mask(q, k, partition, TopK(2))).shape
        torch.Size([1, 2, 256, 16])
    """
    check_choice("token_order", token_order, TOKEN_ORDERS)
    check_positive("tile_size", tile_size)
    check_query_key(query, key, partition, rule)
    check_text_lengths(text_lengths, query, partition)
    if token_order == "block":
        query, key = partition.to_raster_order(query), partition.to_raster_order(key)
    selection = choose_blocks(query, key, partition, rule)
    return selection_mask(selection, partition, token_order, tile_size, text_lengths)


def selection_mask(
    selection: Tensor,
    partition: BlockPartition,
    token_order: str,
    tile_size: int = 128,
    text_lengths: Tensor | None = None,
) -> BlockMask:
    """Turns a selection ``(B, H, video tokens, N)`` in raster order into a mask for tokens in ``token_order``."""
    # Block order leaves prefix and suffix where they are, and all video keys are there.
    live = keys_there(partition, text_lengths)
    return group_mask(*_ordered_groups(selection, partition, token_order), tile_size=tile_size, key_live=live)


def selection_tiles(
    selection: Tensor,
    partition: BlockPartition,
    token_order: str,
    tile_size: int = 128,
    key_live: Tensor | None = None,
) -> TileMap:
    """The tiles of that mask, without the mask; ``key_live``: bool ``(B, S)``, False at padding."""
    return group_tiles(*_ordered_groups(selection, partition, token_order), tile_size, key_live)


def _ordered_groups(selection: Tensor, partition: BlockPartition, token_order: str) -> tuple[Tensor, Tensor]:
    selection, groups = key_groups(selection, partition)
    if token_order == "block":
        return partition.to_block_order(selection), partition.to_block_order(groups, dim=0)
    return selection, groups


def key_groups(selection: Tensor, partition: BlockPartition, queries: Queries | None = None) -> tuple[Tensor, Tensor]:
    """``with_text``, and the group of each key, int64 ``(S,)``, both in raster order."""
    return with_text(selection, partition, queries), group_of_key(partition, selection.device)


def with_text(selection: Tensor, partition: BlockPartition, queries: Queries | None = None) -> Tensor:
    """Extends a selection by prefix and suffix, which attend all and which all attend, as one more group of keys.

    Args:
        selection: bool ``(B, H, video queries, N)`` in raster order.
        partition: the blocks.
        queries: which queries there are; None for all.

    Returns:
        bool ``(B, H, queries, G)``.
    """
    if not partition.prefix + partition.suffix:
        return selection
    before, _, _, behind = queries or Queries.of(partition)
    # Padded the other way round, so that queries stay contiguous if they are.
    return F.pad(selection.mT, (before, behind, 0, 1), value=True).mT


def keys_there(partition: BlockPartition, text_lengths: Tensor | None) -> Tensor | None:
    """Which keys are no padding: bool ``(B, S)`` in raster order, or None if all are there.

    Args:
        partition: the blocks.
        text_lengths: int64 ``(B,)``, as in ``vmoba_attention``.
    """
    if text_lengths is None:
        return None
    text = torch.arange(partition.prefix + partition.suffix, device=text_lengths.device) < text_lengths[:, None]
    video = text.new_ones(len(text), partition.num_video_tokens)
    return torch.cat([text[:, : partition.prefix], video, text[:, partition.prefix :]], 1)


def keys_of_groups(partition: BlockPartition, text_lengths: Tensor) -> Tensor:
    """How many keys of each group are there, the first ones: int32 ``(B, G)``.

    Args:
        partition: the blocks, with prefix or suffix.
        text_lengths: int64 ``(B,)``, as in ``vmoba_attention``.
    """
    sizes = partition.block_sizes(text_lengths.device).expand(len(text_lengths), -1)
    return torch.cat([sizes, text_lengths[:, None]], 1).int()


def group_of_key(partition: BlockPartition, device: torch.device) -> Tensor:
    """The block of each video token, and ``num_blocks`` for prefix and suffix; int64 ``(S,)`` in raster order."""
    return F.pad(partition.block_ids(device), (partition.prefix, partition.suffix), value=partition.num_blocks)


def block_slots(partition: BlockPartition, device: torch.device, tile_size: int = TILE) -> Slots:
    """The slots of a partition's tokens: its blocks, then prefix and suffix together, each in whole tiles."""
    # Slabs of frames, with no text before them, are in block order as they come.
    in_order = partition.block[1:] == partition.grid[1:] and not partition.prefix
    return plan_slots(group_of_key(partition, device), group_sizes(partition), tile_size, sorted_keys=in_order)


def group_sizes(partition: BlockPartition) -> list[int]:
    """Keys in each group of ``key_groups``, on the host."""
    axes = (
        [min(size - start, block) for start in range(0, size, block)]
        for size, block in zip(partition.grid, partition.block, strict=True)
    )
    text = partition.prefix + partition.suffix
    return [t * y * x for t, y, x in itertools.product(*axes)] + ([text] if text else [])
