"""Query, key and cells -> the gates "cells" and "spread": what mass each block has, estimated from its cells.

The score of a block is the log-sum-exp over its cells of ``s q . mean + log n + v / 2``, where ``n`` counts the tokens
of a cell, ``s`` is ``1 / sqrt(D)``, and ``v = s**2 sum_d q_d**2 var_d`` estimates the variance of the scaled scores in
the cell. "spread" adds ``log(v) / 2`` to each term.

B batch, H heads, S tokens, N blocks, D head dim; P places for the cells of a block (``cell_places``).
"""

import math

import torch
from torch import Tensor

from block_masks.launching.device import on_device
from block_masks.precision import accumulator, without_autocast
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.selection.cell_places import LEAST_VARIANCE, CellStats, gate_cells, place_of_token, places_of_block
from vmoba_flex.selection.gate import num_blocks
from vmoba_flex.tail import Cells

_KERNEL_MAX_DIM = 256
_CHUNK_SCORES = 2**26  # in memory at a time: 256 MiB in float32


@torch.no_grad()
def cell_gate(
    query: Tensor, key: Tensor, partition: BlockPartition, spread: bool, queries: Queries | None = None
) -> Tensor:
    """Scores of the blocks by their cells: natural logarithms of masses, up to a constant for each query.

    Args:
        query: ``(B, H, S, D)`` in raster order, with prefix and suffix; or other queries, in float32 at least.
        key: ``(B, key heads, S, D)`` in raster order; query head h uses key head ``h // (H // key heads)``.
        partition: the blocks.
        spread: whether the scores are those of "spread", and not of "cells".
        queries: those of ``query``; None for all.

    Returns:
        ``(B, H, video queries, N)``, float32, or float64 for float64 inputs; block by block in memory, as most pools
        read it.
    """
    before, _, video, _ = Queries.of(partition) if queries is None else queries
    return _cell_gate(query, key, partition.flat, list(gate_cells(partition).cell), before, video, spread)


# Opaque to Inductor, so that a compiled selection sees the same scores, to the bit, as an eager one.
@torch.library.custom_op("vmoba_flex::cell_gate", mutates_args=())
@on_device
def _cell_gate(
    query: Tensor, key: Tensor, sizes: list[int], cell: list[int], before: int, count: int, spread: bool
) -> Tensor:
    partition = BlockPartition.of_flat(sizes)
    stats = cell_stats(key, Cells(partition, (cell[0], cell[1], cell[2])))
    return cell_scores(query, stats, partition.num_blocks, before, count, spread)


@_cell_gate.register_fake
def _(query: Tensor, key: Tensor, sizes: list[int], cell: list[int], before: int, count: int, spread: bool) -> Tensor:
    return query.new_empty(*query.shape[:2], num_blocks(sizes), count, dtype=accumulator(query)).mT


def cell_stats(key: Tensor, cells: Cells) -> CellStats:
    """Mean, variance and log count of the tokens of each cell, taken in float32 at least.

    Args:
        key: ``(B, key heads, S, D)`` in raster order, prefix and suffix included.
        cells: of its tokens.
    """
    if key.is_cuda and key.dtype != torch.float64 and key.shape[-1] <= _KERNEL_MAX_DIM:
        from vmoba_flex.selection import cell_gate_kernels

        return cell_gate_kernels.cell_stats(key, cells)
    partition, many = cells.partition, places_of_block(cells.per_block)
    place = place_of_token(cells, key.device)
    exact = key[:, :, partition.prefix : partition.prefix + len(place)].to(accumulator(key))
    # bincount would read from a GPU how many there are.
    tokens = exact.new_zeros(partition.num_blocks * many).index_add_(0, place, exact.new_ones(len(place)))

    def mean(x: Tensor) -> Tensor:
        sums = x.new_zeros(*x.shape[:2], len(tokens), x.shape[3]).index_add_(2, place, x)
        return sums / tokens.clamp(min=1)[:, None]

    means = mean(exact)
    variances = mean((exact - means.index_select(2, place)).square()).clamp(max=torch.finfo(key.dtype).max)
    return CellStats(means.to(key.dtype), variances.to(key.dtype), tokens.log())


def cell_scores(query: Tensor, stats: CellStats, blocks: int, before: int, count: int, spread: bool) -> Tensor:
    """Scores of the blocks, from what is known of their cells.

    Args:
        query: ``(B, H, queries, D)``.
        stats: of the cells.
        blocks: N.
        before: queries before the first that is scored.
        count: queries that are scored.
        spread: as in ``cell_gate``.

    Returns:
        ``(B, H, count, N)`` in the dtype of the bias; block by block in memory.
    """
    batch, heads, _, dim = query.shape
    in_16_bit = query.dtype == stats.mean.dtype and query.element_size() == 2
    if query.is_cuda and in_16_bit and dim <= _KERNEL_MAX_DIM and count:
        from vmoba_flex.selection import cell_gate_kernels

        return cell_gate_kernels.cell_scores(query, stats, blocks, before, count, spread)
    scores = torch.empty(batch, heads, blocks, count, dtype=stats.bias.dtype, device=query.device)
    rows = max(1, _CHUNK_SCORES // (batch * heads * len(stats.bias)))
    for first in range(0, count, rows):
        chunk = query[:, :, before + first : before + min(first + rows, count)]
        scores[..., first : first + rows] = _scores(chunk, stats, blocks, spread).mT
    return scores.mT


def _scores(query: Tensor, stats: CellStats, blocks: int, spread: bool) -> Tensor:
    """``(B, H, queries, N)``; squared queries are rounded to the queries' dtype, in which the kernel multiplies."""
    exact, scale = stats.bias.dtype, 1 / math.sqrt(query.shape[-1])
    squares = (query.to(exact) * scale).square().clamp(max=torch.finfo(query.dtype).max).to(query.dtype)
    mean, variance = (x.to(exact)[:, :, None].mT for x in (stats.mean, stats.variance))
    by_key_head = query.unflatten(1, (mean.shape[1], -1)), squares.unflatten(1, (mean.shape[1], -1))
    with without_autocast(query):
        query, squares = (x.to(exact) for x in by_key_head)
        half = squares @ variance / 2
        terms = (query @ mean * scale + half + stats.bias).flatten(1, 2)
    if spread:
        terms = terms + (2 * half).clamp(min=LEAST_VARIANCE).log().flatten(1, 2) / 2
    return terms.unflatten(-1, (blocks, -1)).logsumexp(-1)
