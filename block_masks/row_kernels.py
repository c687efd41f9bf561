"""Triton forms of the steps around attention over packed rows, loaded on first use on a CUDA device.

All are bound by memory: each program moves a few rows of ``D`` values and the indices that it needs. Offsets are int64,
since rows times ``D`` may pass 2**31.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launch import QuickLaunch


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
    """Copies queries ``(H * S, D)``, or numbers of theirs ``(H * S,)``, to their rows.

    Args:
        source: contiguous.
        row_query: int32 ``(rows,)``, -1 in rows that only fill a tile; these get ``fill``.
        row_pool: int32 ``(row tiles,)``, -1 in unused tiles, behind the others; these are left as they are.
        fill: for rows that only fill a tile.
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
    """See ``slots.take_slots``."""
    heads, length, dim = source.shape[0] // repeats, source.shape[1], source.shape[2]
    places = index.shape[-1]
    target = source.new_empty(heads, places, dim)
    _slots_kernel[heads * triton.cdiv(places, 32),](
        source, index.contiguous(), target, places, length, heads * places // index.numel(),
        REPEATS=repeats, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=32,
    )  # fmt: skip
    return target


@QuickLaunch
@triton.jit
def _sum_kernel(
    rows, query_rows, query_count, total, queries, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    count = tl.load(query_count + head * queries + query, mask=query < queries, other=0)
    listed = query_rows + head * groups * queries + query
    step = tl.full((), 0, tl.int64) + queries
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, tl.max(count, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            row = tl.load(listed + (start + i) * step, mask=start + i < count, other=-1).to(tl.int64)
            mask = (row >= 0)[:, None] & (dim < D)
            acc += tl.load(rows + row[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    target = total + (head * queries + query)[:, None] * D + dim
    tl.store(target, acc.to(total.dtype.element_ty), mask=(query < queries)[:, None] & (dim < D))


def sum_rows(rows: Tensor, query_rows: Tensor, query_count: Tensor, total: Tensor) -> None:
    """See ``row_steps.sum_rows``."""
    (heads, groups, queries), dim = query_rows.shape, rows.shape[1]
    _sum_kernel[heads * triton.cdiv(queries, 16),](
        rows, query_rows, query_count, total, queries, groups,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=16, UNROLL=4, num_warps=2,
    )  # fmt: skip


@triton.jit
def share_left(lse, filler_lse):
    """What filling slots leave of the sum of ``exp(score)``."""
    return 1 - tl.where(filler_lse == -float("inf"), 0.0, tl.exp(filler_lse - lse))


@QuickLaunch
@triton.jit
def _merge_kernel(
    output, lse, query_rows, query_count, filler_lse, merged, merged_lse, queries, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr, UNROLL: tl.constexpr,
    FILLERS: tl.constexpr,
):  # fmt: skip
    """First the whole log-sum-exp, then the weighted sum: its loads wait for nothing but the list of rows."""
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = query < queries
    dim = tl.arange(0, BLOCK_D)[None, :]
    count = tl.load(query_count + head * queries + query, mask=inside, other=0)
    listed = query_rows + head * groups * queries + query
    step = tl.full((), 0, tl.int64) + queries
    most = tl.max(count, 0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, most, LISTED):
        i = start + tl.arange(0, LISTED)[:, None]
        row = tl.load(listed[None, :] + i * step, mask=i < count[None, :], other=-1)
        part = tl.load(lse + row, mask=row >= 0, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(part, 0))
        # Tests for absence, not for -inf after the maximum: a NaN must reach the sums.
        keep = tl.where(top == -float("inf"), 0.0, tl.exp(top - new_top))
        add = tl.where(part == -float("inf"), 0.0, tl.exp(part - new_top[None, :]))
        total = total * keep + tl.sum(add, 0)
        top = new_top
    whole = top + tl.log(tl.where(total == 0, 1.0, total))
    if FILLERS:
        of_fillers = tl.load(filler_lse + head * queries + query, mask=inside, other=-float("inf"))
        whole += tl.log(share_left(whole, of_fillers))
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, most, UNROLL):
        for i in tl.static_range(UNROLL):
            row = tl.load(listed + (start + i) * step, mask=start + i < count, other=-1).to(tl.int64)
            part = tl.load(lse + row, mask=row >= 0, other=-float("inf"))
            weight = tl.where(part == -float("inf"), 0.0, tl.exp(part - whole))
            mask = (row >= 0)[:, None] & (dim < D)
            acc += weight[:, None] * tl.load(output + row[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    place = head * queries + query
    tl.store(merged + place[:, None] * D + dim, acc.to(merged.dtype.element_ty), mask=inside[:, None] & (dim < D))
    tl.store(merged_lse + place, whole, mask=inside)


def merge_rows(
    output: Tensor, lse: Tensor, query_rows: Tensor, query_count: Tensor, merged: Tensor, merged_lse: Tensor,
    filler_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """See ``row_steps.merge_rows``."""
    (heads, groups, queries), dim = query_rows.shape, output.shape[1]
    _merge_kernel[heads * triton.cdiv(queries, 16),](
        output, lse, query_rows, query_count, lse if filler_lse is None else filler_lse, merged, merged_lse,
        queries, groups, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=16, LISTED=16, UNROLL=4,
        FILLERS=filler_lse is not None, num_warps=2,
    )  # fmt: skip


@QuickLaunch
@triton.jit
def _delta_kernel(grad, output, delta, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DV)[None, :]
    mask = (row < rows)[:, None] & (dim < DV)
    g = tl.load(grad + row[:, None] * DV + dim, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(output + row[:, None] * DV + dim, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(g * o, 1), mask=row < rows)


def delta(grad: Tensor, output: Tensor) -> Tensor:
    """See ``row_steps.delta``."""
    out = torch.empty(grad.shape[:2], dtype=torch.float32, device=grad.device)
    dim = grad.shape[-1]
    _delta_kernel[triton.cdiv(out.numel(), 32),](
        grad, output, out, out.numel(), DV=dim, BLOCK_DV=triton.next_power_of_2(dim), ROWS=32
    )
    return out
