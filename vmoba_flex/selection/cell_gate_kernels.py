"""The gates "cells" and "spread" in Triton, loaded on first use on a CUDA device: key and query are read once.

No score of a cell is written: a program multiplies a tile of queries with the cells of a few blocks, and keeps the
log-sum-exp of each block.

B batch, H heads, S tokens, N blocks, D head dim; P places for the cells of a block (``cell_places``).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.selection.cell_places import LEAST_VARIANCE, CellStats, places_of_block
from vmoba_flex.tail import Cells

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(LEAST_VARIANCE)
_LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose difference with itself is a number
_TOKENS, _WARPS = 64, 1  # that a program of the statistics reads at once, and its warps
_FLOAT32_PRODUCTS = False  # for Triton's interpreter, which cannot multiply bfloat16


@QuickLaunch
@triton.jit
def _stats_kernel(
    key, means, variances, bias, stride_batch, stride_head, stride_token, stride_dim, heads, prefix,
    frames, height, width, bt, bh, bw, blocks_y, blocks_x, many_t, many_y, many_x, places, largest,
    CT: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr, TOKENS: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and variance of one place of one head, around its first token, so that no digits cancel."""
    place, head = tl.program_id(0) % places, (tl.program_id(0) // places).to(tl.int64)
    block, cell = place // P, place % P
    cell_t, cell_y, cell_x = cell // (many_y * many_x), cell // many_x % many_y, cell % many_x
    block_t, block_y, block_x = block // (blocks_y * blocks_x), block // blocks_x % blocks_y, block % blocks_x
    first_t, first_y, first_x = block_t * bt + cell_t * CT, block_y * bh + cell_y * CH, block_x * bw + cell_x * CW
    # Tokens along each axis up to the ends of cell, block and grid; none where a block has fewer cells.
    nt = tl.minimum(tl.minimum(bt - cell_t * CT, CT), frames - first_t)
    ny = tl.minimum(tl.minimum(bh - cell_y * CH, CH), height - first_y)
    nx = tl.minimum(tl.minimum(bw - cell_x * CW, CW), width - first_x)
    count = tl.maximum(nt, 0) * tl.maximum(ny, 0) * tl.maximum(nx, 0)
    dim = tl.arange(0, BLOCK_D)
    start = key + head // heads * stride_batch + head % heads * stride_head + dim * stride_dim
    at_first = start + (prefix + (first_t * height + first_y) * width + first_x).to(tl.int64) * stride_token
    shift = tl.load(at_first, mask=(dim < D) & (count > 0), other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for first in range(0, CT * CH * CW, TOKENS):
        member = first + tl.arange(0, TOKENS)
        t, y, x = member // (CH * CW), member // CW % CH, member % CW
        inside = (t < nt) & (y < ny) & (x < nx)
        token = prefix + ((first_t + t) * height + first_y + y) * width + first_x + x
        at = start[None, :] + token[:, None].to(tl.int64) * stride_token
        rows = tl.load(at, mask=inside[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
        rows = tl.where(inside[:, None], rows - shift[None, :], 0.0)
        total += rows
        squares += rows * rows
    many = tl.maximum(count, 1).to(tl.float32)
    off = tl.sum(total, 0) / many
    variance = tl.maximum(tl.sum(squares, 0) / many - off * off, 0.0)
    # NaN stays NaN in the mean, and so in the score.
    variance = tl.minimum(variance, largest)
    out = (head * places + place) * D + dim
    tl.store(means + out, (shift + off).to(means.dtype.element_ty), mask=dim < D)
    tl.store(variances + out, variance.to(variances.dtype.element_ty), mask=dim < D)
    tl.store(bias + place, tl.log(count.to(tl.float32)), mask=head == 0)


@triton.jit
def _dot(rows, columns, WIDE: tl.constexpr):
    if WIDE:
        rows, columns = rows.to(tl.float32), columns.to(tl.float32)
    return tl.dot(rows, tl.trans(columns))


@triton.jit
def _terms(
    rows, squares, means, variances, bias, cell, cells, factor,
    SPREAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithms of the masses of some cells, and what they count times: standard deviations for "spread"."""
    dim = tl.arange(0, BLOCK_D)
    at, mask = cell[:, None] * D + dim[None, :], (cell < cells)[:, None] & (dim < D)[None, :]
    mean = tl.load(means + at, mask=mask, other=0.0)
    variance = tl.load(variances + at, mask=mask, other=0.0)
    more = tl.load(bias + cell, mask=cell < cells, other=-float("inf")) * _LOG2E
    of_scores = _dot(squares, variance, WIDE)
    score = _dot(rows, mean, WIDE) * factor + (of_scores * (_LOG2E / 2) + more[None, :])
    times = of_scores
    if SPREAD:
        times = tl.sqrt(tl.maximum(of_scores, _LEAST))
    return score, times


@QuickLaunch
@triton.jit
def _score_kernel(
    query, means, variances, bias, scores, stride_batch, stride_head, stride_token, stride_dim,
    heads, repeats, before, count, blocks, token_tiles, scale, largest,
    P: tl.constexpr, SPREAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of one head's queries against all blocks, ``CELLS`` cells at a time."""
    head = (tl.program_id(0) // token_tiles).to(tl.int64)
    first = (tl.program_id(0) % token_tiles).to(tl.int64) * TILE
    row, dim = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    inside = row < tl.minimum(count - first, TILE).to(tl.int32)
    start = query + head // heads * stride_batch + head % heads * stride_head + (before + first) * stride_token
    at = start + row[:, None].to(tl.int64) * stride_token + dim[None, :] * stride_dim
    rows = tl.load(at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    squares = rows.to(tl.float32) * scale
    squares = tl.minimum(squares * squares, largest).to(rows.dtype)
    # Counting heads over all samples gives the right key head, since each sample has the same number.
    cells = blocks * P
    means += head // repeats * cells * D
    variances += head // repeats * cells * D
    out = scores + head * blocks * count + first + row
    factor = scale * _LOG2E
    if P <= CELLS:
        for cell in range(0, cells, CELLS):
            score, times = _terms(
                rows, squares, means, variances, bias, cell + tl.arange(0, CELLS), cells, factor,
                SPREAD, D, BLOCK_D, WIDE,
            )  # fmt: skip
            score = tl.reshape(score, (TILE, CELLS // P, P))
            top = tl.max(score, 2)
            mass = tl.exp2(score - top[:, :, None])
            if SPREAD:
                mass *= tl.reshape(times, (TILE, CELLS // P, P))
            lse = (top + tl.log2(tl.sum(mass, 2))) * _LN2
            block = cell // P + tl.arange(0, CELLS // P)
            mask = inside[:, None] & (block < blocks)[None, :]
            tl.store(out[:, None] + block[None, :] * count, lse, mask=mask)
    else:
        for block in range(blocks):
            top = tl.full((TILE,), _LOWEST, tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            for cell in range(block * P, block * P + P, CELLS):
                score, times = _terms(
                    rows, squares, means, variances, bias, cell + tl.arange(0, CELLS), cells, factor,
                    SPREAD, D, BLOCK_D, WIDE,
                )  # fmt: skip
                higher = tl.maximum(top, tl.max(score, 1))
                mass = tl.exp2(score - higher[:, None])
                if SPREAD:
                    mass *= times
                total = total * tl.exp2(top - higher) + tl.sum(mass, 1)
                top = higher
            tl.store(out + block * count, (top + tl.log2(total)) * _LN2, mask=inside)


def cell_stats(key: Tensor, cells: Cells) -> CellStats:
    """``cell_gate.cell_stats`` of a key of at most 32 bit and 256 dims, any strides."""
    (batch, heads, _, dim), partition = key.shape, cells.partition
    many, (ct, ch, cw) = places_of_block(cells.per_block), cells.cell
    places = partition.num_blocks * many
    mean = torch.empty(batch, heads, places, dim, dtype=key.dtype, device=key.device)
    stats = CellStats(mean, torch.empty_like(mean), torch.empty(places, dtype=torch.float32, device=key.device))
    _stats_kernel[batch * heads * places,](
        key, *stats, *key.stride(), heads, partition.prefix, *partition.grid, *partition.block, *partition.cells[1:],
        *cells.per_block, places, torch.finfo(key.dtype).max, CT=ct, CH=ch, CW=cw,
        TOKENS=min(_TOKENS, triton.next_power_of_2(ct * ch * cw)), P=many,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), num_warps=_WARPS,
    )  # fmt: skip
    return stats


class Launch(NamedTuple):
    """Queries of a program, cells that it multiplies at once, warps, and stages."""

    tile: int
    cells: int
    warps: int
    stages: int


# NARROW is as fast as any of those timed on an H200 (bench/NOTES.md). A block has a power of two of places, or a
# multiple of 64: cells at once must divide it, or it them.
NARROW, WIDE = Launch(64, 64, 4, 2), Launch(64, 32, 4, 1)


def launch_of(query: Tensor) -> Launch:
    """How the kernel of scores is launched for such queries."""
    return WIDE if query.shape[-1] > 128 else NARROW


def cell_scores(
    query: Tensor, stats: CellStats, blocks: int, before: int, count: int, spread: bool, launch: Launch | None = None
) -> Tensor:
    """``cell_gate.cell_scores`` of a 16-bit query of at most 256 dims, any strides; ``launch``: None for the best."""
    batch, heads, _, dim = query.shape
    scores = torch.empty(batch, heads, blocks, count, dtype=torch.float32, device=query.device)
    padded = max(16, triton.next_power_of_2(dim))
    tile, at_once, warps, stages = launch or launch_of(query)
    many = len(stats.bias) // blocks
    assert many % at_once == 0 or at_once % many == 0, (many, at_once)
    token_tiles = triton.cdiv(count, tile)
    _score_kernel[batch * heads * token_tiles,](
        query, *stats, scores, *query.stride(), heads, heads // stats.mean.shape[1], before, count, blocks, token_tiles,
        1 / math.sqrt(dim), torch.finfo(query.dtype).max, P=many, SPREAD=spread,
        D=dim, BLOCK_D=padded, TILE=tile, CELLS=at_once, WIDE=_FLOAT32_PRODUCTS, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return scores.mT
