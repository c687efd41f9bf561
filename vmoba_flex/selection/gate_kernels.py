"""The gate of 16-bit inputs in Triton, loaded on first use on a CUDA device: query and key are read once.

A block's mean is computed in float32 and kept as the sum of three bfloat16 parts, which hold its 24 bits. Products of
16-bit numbers are exact in float32, so three tensor-core products, added up in a fixed order, give float32 accuracy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.partition import BlockPartition

_CHUNK = 256  # tokens of a block that one program adds up
_FLOAT32_PRODUCTS = False  # for Triton's interpreter, which cannot multiply bfloat16


@QuickLaunch
@triton.jit
def _sum_kernel(
    key, sums, stride_batch, stride_head, stride_token, stride_dim, heads, prefix, frames, height, width, bt, bh, bw,
    cells_y, cells_x, blocks, chunks, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds up a chunk of a block's tokens."""
    program = tl.program_id(0).to(tl.int64)
    chunk, head = tl.program_id(0) % chunks, program // chunks // blocks
    block = tl.program_id(0) // chunks % blocks
    first_t = block // (cells_y * cells_x) * bt
    first_y, first_x = block // cells_x % cells_y * bh, block % cells_x * bw
    dim = tl.arange(0, BLOCK_D)
    start = key + head // heads * stride_batch + head % heads * stride_head + dim[None, :] * stride_dim
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for row in range(0, CHUNK, ROWS):
        # Tokens of a whole block in raster order; mask those outside of the grid.
        member = chunk * CHUNK + row + tl.arange(0, ROWS)
        t, y, x = first_t + member // (bh * bw), first_y + member // bw % bh, first_x + member % bw
        inside = (member < bt * bh * bw) & (t < frames) & (y < height) & (x < width)
        token = prefix + (t * height + y) * width + x
        rows = tl.load(
            start + token[:, None].to(tl.int64) * stride_token, mask=inside[:, None] & (dim < D)[None, :], other=0.0
        )
        total += rows.to(tl.float32)
    tl.store(sums + program * D + dim, tl.sum(total, 0), mask=dim < D)


@QuickLaunch
@triton.jit
def _mean_kernel(
    sums, means, parts, frames, height, width, bt, bh, bw, cells_y, cells_x, blocks, chunks, part_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Adds up a block's chunks and divides by its size; then splits the mean, or keeps it."""
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(0) % blocks
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for row in range(0, chunks, ROWS):
        chunk = row + tl.arange(0, ROWS)
        at = (program * chunks + chunk)[:, None] * D + dim[None, :]
        total += tl.load(sums + at, mask=(chunk < chunks)[:, None] & (dim < D)[None, :], other=0.0)
    nt = tl.minimum(frames - block // (cells_y * cells_x) * bt, bt)
    ny = tl.minimum(height - block // cells_x % cells_y * bh, bh)
    nx = tl.minimum(width - block % cells_x * bw, bw)
    mean = tl.div_rn(tl.sum(total, 0), (nt * ny * nx).to(tl.float32))
    at = program * D + dim
    if SPLIT:
        high = mean.to(tl.bfloat16)
        # An infinite mean would leave NaN.
        left = tl.where(tl.abs(mean) < float("inf"), mean - high.to(tl.float32), 0.0)
        middle = left.to(tl.bfloat16)
        tl.store(parts + at, high, mask=dim < D)
        tl.store(parts + part_stride + at, middle, mask=dim < D)
        tl.store(parts + 2 * part_stride + at, (left - middle.to(tl.float32)).to(tl.bfloat16), mask=dim < D)
    else:
        tl.store(means + at, mean, mask=dim < D)


@triton.jit
def _dot(rows, part, total, WIDE: tl.constexpr):
    if WIDE:
        rows, part = rows.to(tl.float32), part.to(tl.float32)
    return tl.dot(rows, tl.trans(part), total)


@QuickLaunch
@triton.jit
def _score_kernel(
    query, parts, scores, stride_batch, stride_head, stride_token, stride_dim, heads, repeats, prefix, tokens, blocks,
    token_tiles, part_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of one head's queries against all blocks."""
    head = (tl.program_id(0) // token_tiles).to(tl.int64)
    first = (tl.program_id(0) % token_tiles).to(tl.int64) * TILE
    row, dim = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    inside = row < tl.minimum(tokens - first, TILE).to(tl.int32)
    start = query + head // heads * stride_batch + head % heads * stride_head + (prefix + first) * stride_token
    at = start + row[:, None].to(tl.int64) * stride_token + dim[None, :] * stride_dim
    rows = tl.load(at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    high = rows.to(tl.bfloat16)
    low = high
    if HALF:
        # float16 has 11 bits: two bfloat16 parts hold them.
        whole = rows.to(tl.float32)
        low = tl.where(tl.abs(whole) < float("inf"), whole - high.to(tl.float32), 0.0).to(tl.bfloat16)
    for block_start in range(0, blocks, BLOCKS):
        block = block_start + tl.arange(0, BLOCKS)
        mask = (block < blocks)[:, None] & (dim < D)[None, :]
        # Counting heads over all samples gives the right key head, since each sample has the same number.
        part = parts + (head // repeats * blocks + block)[:, None] * D + dim[None, :]
        total = tl.zeros((TILE, BLOCKS), tl.float32)
        # Small terms first.
        for i in tl.static_range(3):
            mean = tl.load(part + (2 - i) * part_stride, mask=mask, other=0.0)
            if HALF:
                total = _dot(low, mean, total, WIDE)
            total = _dot(high, mean, total, WIDE)
        out = scores + (head * blocks + block)[None, :] * tokens + first + row[:, None]
        tl.store(out, total, mask=inside[:, None] & (block < blocks)[None, :])


def _geometry(partition: BlockPartition) -> tuple[int, ...]:
    return (*partition.grid, *partition.block, *partition.cells[1:])


def _mean_parts(key: Tensor, partition: BlockPartition, means: Tensor | None) -> Tensor:
    """Computes block means into ``means``, or returns their three parts, bfloat16 ``(3, B, heads, N, D)``."""
    batch, heads, _, dim = key.shape
    blocks, (bt, bh, bw) = partition.num_blocks, partition.block
    chunks, padded = triton.cdiv(bt * bh * bw, _CHUNK), triton.next_power_of_2(dim)
    sums = torch.empty(batch * heads * blocks * chunks * dim, dtype=torch.float32, device=key.device)
    split, chunk = means is None, min(_CHUNK, triton.next_power_of_2(bt * bh * bw))
    parts = torch.empty((3, batch, heads, blocks, dim) if split else 1, dtype=torch.bfloat16, device=key.device)
    _sum_kernel[batch * heads * blocks * chunks,](
        key, sums, *key.stride(), heads, partition.prefix, *_geometry(partition), blocks, chunks,
        D=dim, BLOCK_D=padded, CHUNK=chunk, ROWS=min(chunk, 4096 // padded),
    )  # fmt: skip
    _mean_kernel[batch * heads * blocks,](
        sums, parts if means is None else means, parts, *_geometry(partition), blocks, chunks,
        batch * heads * blocks * dim, D=dim, BLOCK_D=padded, ROWS=min(16, triton.next_power_of_2(chunks)), SPLIT=split,
    )  # fmt: skip
    return parts


def block_means(key: Tensor, partition: BlockPartition) -> Tensor:
    """``gate.block_means`` of a float16 or bfloat16 key of at most 256 dims."""
    batch, heads, _, dim = key.shape
    means = torch.empty(batch, heads, partition.num_blocks, dim, dtype=torch.float32, device=key.device)
    _mean_parts(key, partition, means)
    return means


def gate(query: Tensor, key: Tensor, partition: BlockPartition, before: int, count: int) -> Tensor:
    """``gate.gate`` of float16 or bfloat16 inputs of at most 256 dims.

    Args:
        query: ``(B, H, S, D)``, any strides.
        key: ``(B, key heads, S, D)``, any strides.
        partition: the blocks.
        before: text queries before the video's.
        count: video queries.

    Returns:
        float32 ``(B, H, video queries, N)``, the transpose of a contiguous tensor.
    """
    batch, heads, _, dim = query.shape
    blocks = partition.num_blocks
    parts = _mean_parts(key, partition, None)
    scores = torch.empty(batch, heads, blocks, count, dtype=torch.float32, device=query.device)
    padded = max(16, triton.next_power_of_2(dim))
    tile, most = (128, 64) if padded <= 128 else (64, 32)
    block_tile = min(most, max(16, triton.next_power_of_2(blocks)))
    if blocks > most and -blocks % (most // 2) < -blocks % most:
        block_tile //= 2  # 72 blocks as 96, not 128
    token_tiles = triton.cdiv(count, tile)
    _score_kernel[batch * heads * token_tiles,](
        query, parts, scores, *query.stride(), heads, heads // key.shape[1], before, count, blocks,
        token_tiles, parts[0].numel(), D=dim, BLOCK_D=padded, TILE=tile, BLOCKS=block_tile,
        HALF=query.dtype == torch.float16, WIDE=_FLOAT32_PRODUCTS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return scores.mT
