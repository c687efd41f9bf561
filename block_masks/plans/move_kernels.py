"""Triton kernels that copy queries to rows and tokens to slots, loaded on first use on a CUDA device.

Bound by memory. Offsets are int64, since rows times ``D`` may pass 2**31.
"""

import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch


@QuickLaunch
@triton.jit
def _take_kernel(
    source, row_query, row_pool, target, fill, TILE: tl.constexpr, CLEAR_NEXT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) * ROWS // TILE
    if CLEAR_NEXT:
        tile = tl.maximum(tile - 1, 0)
    if tl.load(row_pool + tile) < 0:
        return
    dim = tl.arange(0, BLOCK_D)[None, :]
    query = tl.load(row_query + row).to(tl.int64)
    x = tl.load(source + query[:, None] * D + dim, mask=(query >= 0)[:, None] & (dim < D), other=0.0)
    x = tl.where((query >= 0)[:, None], x, fill).to(x.dtype)
    tl.store(target + row[:, None] * D + dim, x, mask=dim < D)


def take_rows(
    source: Tensor, row_query: Tensor, row_pool: Tensor, fill: float = 0.0, clear_next: bool = False
) -> Tensor:
    """Copies queries ``(H * S, D)``, or one number for each query ``(H * S,)``, to their rows.

    Args:
        source: contiguous.
        row_query: int32 ``(rows,)``, -1 in padding rows; these get ``fill``.
        row_pool: int32 ``(row tiles,)``, -1 in unused tiles, which come last and are not written.
        fill: for padding rows.
        clear_next: whether the first unused tile gets ``fill`` too.
    """
    (rows,), tiles = row_query.shape, row_pool.shape[0]
    target = source.new_empty(rows, *source.shape[1:])
    dim = source.shape[1] if source.dim() == 2 else 1
    tile_size = rows // tiles
    step = min(tile_size, 32 if dim > 1 else 128)
    _take_kernel[rows // step,](
        source, row_query, row_pool, target, fill,
        TILE=tile_size, CLEAR_NEXT=clear_next, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=step,
    )  # fmt: skip
    return target


@QuickLaunch
@triton.jit
def _slots_kernel(
    source, index, target, places, length, alike,
    REPEATS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(places, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    where = tl.load(index + head // alike * places + place, mask=place < places, other=-1)[:, None]
    there = (where >= 0) & (dim < D)
    total = tl.load(source + (head * REPEATS * length + where) * D + dim, mask=there, other=0.0)
    if REPEATS > 1:
        total = total.to(tl.float32)
        for repeat in range(1, REPEATS):
            x = tl.load(source + ((head * REPEATS + repeat) * length + where) * D + dim, mask=there, other=0.0)
            total += x.to(tl.float32)
    out = target + (head * places + place[:, None]) * D + dim
    tl.store(out, total.to(target.dtype.element_ty), mask=(place < places)[:, None] & (dim < D))


def take_slots(source: Tensor, index: Tensor, repeats: int = 1) -> Tensor:
    """See ``moves.take_slots``."""
    heads, length, dim = source.shape[0] // repeats, source.shape[1], source.shape[2]
    places = index.shape[-1]
    target = source.new_empty(heads, places, dim)
    _slots_kernel[heads * triton.cdiv(places, 32),](
        source, index.contiguous(), target, places, length, heads * places // index.numel(),
        REPEATS=repeats, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=32,
    )  # fmt: skip
    return target
