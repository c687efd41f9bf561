"""The Triton kernel that lists the tiles of a map, loaded on first use on a CUDA device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch


@triton.jit
def _there(row, column, columns, column_step):
    """1 where a column is True, 0 where it is False or past the last one."""
    there = tl.load(row + column.to(tl.int64) * column_step, mask=column < columns, other=0)
    return (there != 0).to(tl.int32)


@QuickLaunch
@triton.jit
def _list_kernel(tiles, counts, listed, rows, columns, step, row_step, column_step, CHUNK: tl.constexpr):
    """Counts the True columns of a row, then places all; where one chunk holds the row, it is read once."""
    program = tl.program_id(0).to(tl.int64)
    row = tiles + program // rows * step + program % rows * row_step
    chunk = _there(row, tl.arange(0, CHUNK), columns, column_step)
    count = tl.sum(chunk, 0)
    for start in range(CHUNK, columns, CHUNK):
        count += tl.sum(_there(row, start + tl.arange(0, CHUNK), columns, column_step), 0)
    tl.store(counts + program, count)
    before = 0
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        seen = before + tl.cumsum(chunk, 0)
        # A False column goes after all True ones, after the False columns to its left.
        place = tl.where(chunk != 0, seen - 1, count + column - seen)
        tl.store(listed + program * columns + place, column, mask=column < columns)
        before += tl.sum(chunk, 0)
        chunk = _there(row, column + CHUNK, columns, column_step)


def list_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """See ``tiles.tile_lists``."""
    maps = tiles.reshape(-1, *tiles.shape[-2:])
    count, rows, columns = maps.shape
    counts = torch.empty(tiles.shape[:-1], dtype=torch.int32, device=tiles.device)
    listed = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device)
    chunk = min(triton.next_power_of_2(columns), 4096)
    _list_kernel[count * rows,](
        maps, counts, listed, rows, columns, *maps.stride(), CHUNK=chunk, num_warps=max(1, chunk // 256)
    )
    return counts, listed
