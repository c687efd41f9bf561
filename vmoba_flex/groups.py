"""A partition -> its key groups, as ``block_masks`` takes them: each block, then prefix and suffix as one group.

B batch, H heads, S tokens, N blocks, G groups: N, or N + 1 with prefix or suffix.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import Slots, plan_slots
from block_masks.plans.rows import TILE
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition


def key_groups(selection: Tensor, partition: BlockPartition, queries: Queries | None = None) -> tuple[Tensor, Tensor]:
    """``with_text``, and the group of each key, int64 ``(S,)``, both in raster order."""
    return with_text(selection, partition, queries), group_of_key(partition, selection.device)


def with_text(selection: Tensor, partition: BlockPartition, queries: Queries | None = None) -> Tensor:
    """Adds prefix and suffix to a selection: as queries that attend everything, and as one more group that all attend.

    Those of a causal partition attend only this group.

    Args:
        selection: bool ``(B, H, video queries, N)`` in raster order.
        partition: the blocks.
        queries: which the selection is of; None for all.

    Returns:
        bool ``(B, H, queries, G)``.
    """
    if not partition.prefix + partition.suffix:
        return selection
    before, _, _, after = queries or Queries.of(partition)
    # Pad the transpose, so that queries stay contiguous if they are.
    if partition.causal_frames is not None:  # prefix and suffix attend themselves only
        return F.pad(F.pad(selection.mT, (before, after)), (0, 0, 0, 1), value=True).mT
    return F.pad(selection.mT, (before, after, 0, 1), value=True).mT


def valid_keys(partition: BlockPartition, text_lengths: Tensor | None) -> Tensor | None:
    """Which keys are valid: bool ``(B, S)`` in raster order, or None if all are.

    Args:
        partition: the blocks.
        text_lengths: int64 ``(B,)``, as in ``vmoba_attention``.
    """
    if text_lengths is None:
        return None
    text = torch.arange(partition.prefix + partition.suffix, device=text_lengths.device) < text_lengths[:, None]
    video = text.new_ones(len(text), partition.num_video_tokens)
    return torch.cat([text[:, : partition.prefix], video, text[:, partition.prefix :]], 1)


def valid_group_lengths(partition: BlockPartition, text_lengths: Tensor) -> Tensor:
    """How many keys of each group are valid, its first ones: int32 ``(B, G)``.

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
    """The slots of a partition's tokens: each group in whole tiles."""
    # Slabs of frames without a prefix have the same raster and block order.
    in_order = partition.block[1:] == partition.grid[1:] and not partition.prefix
    return plan_slots(group_of_key(partition, device), group_sizes(partition), tile_size, sorted_keys=in_order)


def query_slots(partition: BlockPartition, queries: Queries, device: torch.device, tile_size: int = TILE) -> Slots:
    """The slots of the queries of some whole frames; the groups are the blocks that these frames reach, in order."""
    ids = partition.block_ids(device)[queries.first : queries.first + queries.video]
    first, count = first_block(partition, queries), math.prod(partition.grid[1:])
    start, end = queries.first // count, (queries.first + queries.video) // count
    of_t, *sides = partition.axes
    # Frames of each slab of blocks that are among these.
    ends = list(itertools.accumulate(of_t.block_sizes))
    slabs = [min(stop, end) - max(stop - size, start) for stop, size in zip(ends, of_t.block_sizes, strict=True)]
    axes = [[size for size in slabs if size > 0], *[axis.block_sizes for axis in sides]]
    return plan_slots(ids - first, [t * y * x for t, y, x in itertools.product(*axes)], tile_size)


def first_block(partition: BlockPartition, queries: Queries) -> int:
    """The first block that queries of whole frames lie in."""
    of_t, *sides = partition.axes
    start = queries.first // math.prod(partition.grid[1:])
    ends = itertools.accumulate(of_t.block_sizes)
    return sum([end <= start for end in ends]) * math.prod([axis.blocks for axis in sides])


def group_sizes(partition: BlockPartition) -> list[int]:
    """Keys in each group of ``key_groups``, on the host."""
    text = partition.prefix + partition.suffix
    axes = [axis.block_sizes for axis in partition.axes]
    return [t * y * x for t, y, x in itertools.product(*axes)] + ([text] if text else [])
