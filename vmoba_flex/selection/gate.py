"""Query, key and a partition -> the gate "mean": the product of each query with the mean key of each block.

B batch, H heads, S tokens, N blocks, D head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.launching.device import on_device
from block_masks.precision import accumulator, without_autocast
from vmoba_flex.axis import axes_of
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition

_KERNEL_MAX_DIM = 256


def block_means(key: Tensor, partition: BlockPartition) -> Tensor:
    """Mean key of each block, accumulated in float32 (float64 for float64 keys). No gradient flows through it.

    Args:
        key: ``(B, H, S, D)`` in raster order, with prefix and suffix.
        partition: the blocks.

    Returns:
        float32 or float64 ``(B, H, N, D)``.
    """
    return _block_means(key.detach(), partition.flat)


@torch.library.custom_op("vmoba_flex::block_means", mutates_args=())
@on_device
def _block_means(key: Tensor, sizes: list[int]) -> Tensor:
    return _means(key, BlockPartition.of_flat(sizes)).contiguous()


@_block_means.register_fake
def _(key: Tensor, sizes: list[int]) -> Tensor:
    return key.new_empty((*key.shape[:2], num_blocks(sizes), key.shape[3]), dtype=accumulator(key))


def _means(key: Tensor, partition: BlockPartition) -> Tensor:
    if _has_kernels(key):
        from vmoba_flex.selection import gate_kernels

        return gate_kernels.block_means(key, partition)
    (frames, height, width), (bt, bh, bw) = partition.grid, partition.block
    video = key[..., partition.prefix : partition.prefix + partition.num_video_tokens, :]
    # Pad blocks at the far edges with zeros, and divide each sum by its block's true size.
    cells, chunk = video.unflatten(-2, partition.grid), partition.axes[0].period
    if chunk:  # pad each chunk to whole blocks, and drop those that the last chunk does not have
        cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -frames % chunk)).unflatten(-4, (-1, chunk))
        cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -chunk % bt)).flatten(-5, -4)
        frames = partition.cells[0] * bt
        cells = cells.narrow(-4, 0, frames)
    cells = F.pad(cells, (0, 0, 0, -width % bw, 0, -height % bh, 0, -frames % bt))
    nt, ny, nx = partition.cells
    cells = cells.unflatten(-2, (nx, bw)).unflatten(-4, (ny, bh)).unflatten(-6, (nt, bt))
    sums = cells.sum((-6, -4, -2), dtype=accumulator(key)).flatten(-4, -2)
    return sums / partition.block_sizes(key.device)[:, None]


def products(queries: Tensor, means: Tensor) -> Tensor:
    """Products of queries with block means.

    Args:
        queries: ``(B, H, queries, D)``.
        means: float32 or float64 ``(B, key heads, N, D)``; query head h uses key head ``h // (H // key heads)``.

    Returns:
        ``(B, H, queries, N)`` in the dtype of ``means``; block by block in memory, as most pools read it.
    """
    grouped = queries.unflatten(1, (means.shape[1], -1)).to(means.dtype)
    # Under autocast the product would be rounded to 16 bits, and close blocks would tie.
    with without_autocast(queries):
        scores = means[:, :, None] @ grouped.mT
    # Flatten first, so that dims of size 1 get the strides that the fake promises.
    return scores.flatten().view(*queries.shape[:2], means.shape[2], queries.shape[2]).mT


@torch.no_grad()
def gate(query: Tensor, key: Tensor, partition: BlockPartition, queries: Queries | None = None) -> Tensor:
    """Products of each video query with the mean key of each block (arXiv 2506.23858, Sec. 3).

    Not scaled by 1/sqrt(D). No gradient flows through it.

    Args:
        query: ``(B, H, S, D)`` in raster order, with prefix and suffix.
        key: ``(B, key heads, S, D)``; query head h uses key head ``h // (H // key heads)``.
        partition: the blocks.
        queries: which ``query`` holds; None for all.

    Returns:
        ``(B, H, video queries, N)``, float32, or float64 for float64 inputs; block by block in memory, as most pools
        read it.
    """
    before, _, video, _ = Queries.of(partition) if queries is None else queries
    return _gate(query, key, partition.flat, before, video)


# Opaque to Inductor, so that a compiled selection sees the same scores, to the bit, as an eager one.
@torch.library.custom_op("vmoba_flex::gate", mutates_args=())
@on_device
def _gate(query: Tensor, key: Tensor, sizes: list[int], before: int, count: int) -> Tensor:
    partition = BlockPartition.of_flat(sizes)
    if _has_kernels(query) and count:
        from vmoba_flex.selection import gate_kernels

        return gate_kernels.gate(query, key, partition, before, count)
    return products(query[:, :, before : before + count], _means(key, partition))


@_gate.register_fake
def _(query: Tensor, key: Tensor, sizes: list[int], before: int, count: int) -> Tensor:
    shape = (*query.shape[:2], num_blocks(sizes), count)
    return query.new_empty(shape, dtype=accumulator(query)).mT


def num_blocks(sizes: list[int]) -> int:
    """N of the partition with these ``flat`` sizes, which may be symbolic: of those no partition can be made."""
    return math.prod([axis.blocks for axis in axes_of(sizes)])


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.element_size() == 2 and x.shape[-1] <= _KERNEL_MAX_DIM
