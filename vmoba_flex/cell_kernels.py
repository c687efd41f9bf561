"""Triton kernels of the means of cells, loaded on first use on a CUDA device: each token is read once.

Shapes: ``B`` batch, ``H`` heads, ``S`` tokens, ``C`` cells, ``D`` head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.tail import Cells

_TOKENS, _WARPS = 64, 1  # that a program of the means reads at once, and its warps (bench/NOTES.md)


@triton.jit
def axis_place(place, size, block, many, cell):
    """Of a cell's place along an axis: its first token, its tokens, and its block."""
    of_block = place // many
    first = of_block * block + place % many * cell
    end = tl.minimum(tl.minimum(first + cell, (of_block + 1) * block), size)
    return first, end - first, of_block


@QuickLaunch
@triton.jit
def _groups_kernel(
    bias, group, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x, cells,
    blocks_y, blocks_x, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, nt, block_t = axis_place(cell // (grid_y * grid_x), frames, bt, many_t, ct)
    _, ny, block_y = axis_place(cell // grid_x % grid_y, height, bh, many_y, ch)
    _, nx, block_x = axis_place(cell % grid_x, width, bw, many_x, cw)
    tl.store(bias + cell, tl.log((nt * ny * nx).to(tl.float32)), mask=cell < cells)
    tl.store(group + cell, ((block_t * blocks_y + block_y) * blocks_x + block_x).to(tl.int64), mask=cell < cells)


@QuickLaunch
@triton.jit
def _means_kernel(
    x, means, stride_batch, stride_head, stride_token, stride_dim, heads, prefix,
    frames, height, width, bt, bh, bw, many_t, many_y, many_x, grid_y, grid_x, cells,
    CT: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of one cell of one head; a cell's shape is constant, so that no program divides by a variable."""
    cell, head = tl.program_id(0) % cells, (tl.program_id(0) // cells).to(tl.int64)
    first_t, nt, _ = axis_place(cell // (grid_y * grid_x), frames, bt, many_t, CT)
    first_y, ny, _ = axis_place(cell // grid_x % grid_y, height, bh, many_y, CH)
    first_x, nx, _ = axis_place(cell % grid_x, width, bw, many_x, CW)
    dim = tl.arange(0, BLOCK_D)
    start = x + head // heads * stride_batch + head % heads * stride_head + dim[None, :] * stride_dim
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for first in range(0, CT * CH * CW, TOKENS):
        member = first + tl.arange(0, TOKENS)
        t, y, x_ = member // (CH * CW), member // CW % CH, member % CW
        inside = (t < nt) & (y < ny) & (x_ < nx)
        token = prefix + ((first_t + t) * height + first_y + y) * width + first_x + x_
        at = start + token[:, None].to(tl.int64) * stride_token
        total += tl.load(at, mask=inside[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / (nt * ny * nx).to(tl.float32)
    tl.store(means + (head * cells + cell) * D + dim, mean.to(means.dtype.element_ty), mask=dim < D)


@triton.jit
def cell_of_token(token, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x):
    """The cell of each token of the video, -1 outside, and its share of the cell's mean."""
    video = (token >= 0) & (token < frames * height * width)
    t, y, x = token // (height * width), token // width % height, token % width
    cell_t, cell_y = t // bt * many_t + t % bt // ct, y // bh * many_y + y % bh // ch
    cell_x = x // bw * many_x + x % bw // cw
    _, nt, _ = axis_place(cell_t, frames, bt, many_t, ct)
    _, ny, _ = axis_place(cell_y, height, bh, many_y, ch)
    _, nx, _ = axis_place(cell_x, width, bw, many_x, cw)
    cell = (cell_t * grid_y + cell_y) * grid_x + cell_x
    return tl.where(video, cell, -1), 1.0 / tl.where(video, nt * ny * nx, 1).to(tl.float32)


@QuickLaunch
@triton.jit
def _index_kernel(
    index, share, tokens, prefix, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw,
    grid_y, grid_x, cells, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell, part = cell_of_token(
        row - prefix, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x
    )
    tl.store(index + row, cell, mask=row < tokens)
    tl.store(share + row, part, mask=row < tokens)


@QuickLaunch
@triton.jit
def _spread_kernel(
    grad, index, share, whole, tokens, cells, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """Each token's share of its cell's gradient; zero in prefix and suffix."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    cell = tl.load(index + row, mask=inside, other=-1)
    part = tl.load(share + row, mask=inside, other=0.0)
    dim = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(grad + (head * cells + cell)[:, None] * D + dim, mask=(cell >= 0)[:, None] & (dim < D), other=0.0)
    x = x.to(tl.float32) * part[:, None]
    out = whole + (head * tokens + row)[:, None] * D + dim
    tl.store(out, x.to(whole.dtype.element_ty), mask=inside[:, None] & (dim < D))


def geometry(cells: Cells) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What kernels take of cells: before a cell's shape, and after it."""
    partition = cells.partition
    return (*partition.grid, *partition.block, *cells.per_block), (*cells.grid[1:], cells.total)


def cell_groups(cells: Cells, device: torch.device) -> list[Tensor]:
    """See ``cells.cell_groups``; the logs in float32."""
    bias = torch.empty(cells.total, dtype=torch.float32, device=device)
    group = torch.empty(cells.total, dtype=torch.int64, device=device)
    before, after = geometry(cells)
    _groups_kernel[triton.cdiv(cells.total, 256),](
        bias, group, *before, *cells.cell, *after, *cells.partition.cells[1:], BLOCK=256
    )
    return [bias, group]


def cell_means(x: Tensor, cells: Cells) -> Tensor:
    """See ``cells.cell_means``; any strides."""
    batch, heads, _, dim = x.shape
    means = torch.empty(batch, heads, cells.total, dim, dtype=x.dtype, device=x.device)
    before, after = geometry(cells)
    ct, ch, cw = cells.cell
    _means_kernel[cells.total * batch * heads,](
        x, means, *x.stride(), heads, cells.partition.prefix, *before, *after,
        CT=ct, CH=ch, CW=cw, TOKENS=min(_TOKENS, triton.next_power_of_2(ct * ch * cw)),
        D=dim, BLOCK_D=triton.next_power_of_2(dim), num_warps=_WARPS,
    )  # fmt: skip
    return means


def cell_means_backward(grad: Tensor, cells: Cells) -> Tensor:
    """See ``cells.cell_means``; ``grad``: contiguous."""
    batch, heads, _, dim = grad.shape
    tokens = cells.partition.num_tokens
    index, share = _cell_index(cells, grad.device)
    whole = torch.empty(batch, heads, tokens, dim, dtype=grad.dtype, device=grad.device)
    _spread_kernel[triton.cdiv(tokens, 32), batch * heads](
        grad, index, share, whole, tokens, cells.total, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=32
    )
    return whole


def _cell_index(cells: Cells, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token its cell, int32 ``(S,)``, -1 in prefix and suffix; and its share of the cell's mean, float32."""
    tokens = cells.partition.num_tokens
    index = torch.empty(tokens, dtype=torch.int32, device=device)
    share = torch.empty(tokens, dtype=torch.float32, device=device)
    before, after = geometry(cells)
    _index_kernel[triton.cdiv(tokens, 256),](
        index, share, tokens, cells.partition.prefix, *before, *cells.cell, *after, BLOCK=256
    )
    return index, share
