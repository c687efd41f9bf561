"""Triton kernels of the means of cells, loaded on first use on a CUDA device: each token is read once.

Shapes: ``B`` batch, ``H`` heads, ``S`` tokens, ``C`` cells, ``D`` head dim.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from vmoba_flex.tail import Cells

_TOKENS = 64  # that a program reads at once


@triton.jit
def _axis(place, size, block, many, cell):
    """Of a cell's place along an axis: its first token, its tokens, and its block."""
    of_block = place // many
    first = of_block * block + place % many * cell
    end = tl.minimum(tl.minimum(first + cell, (of_block + 1) * block), size)
    return first, end - first, of_block


@QuickLaunch
@triton.jit
def _groups_kernel(
    bias, group, cells, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw,
    grid_y, grid_x, blocks_y, blocks_x, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, nt, block_t = _axis(cell // (grid_y * grid_x), frames, bt, many_t, ct)
    _, ny, block_y = _axis(cell // grid_x % grid_y, height, bh, many_y, ch)
    _, nx, block_x = _axis(cell % grid_x, width, bw, many_x, cw)
    tl.store(bias + cell, tl.log((nt * ny * nx).to(tl.float32)), mask=cell < cells)
    tl.store(group + cell, ((block_t * blocks_y + block_y) * blocks_x + block_x).to(tl.int64), mask=cell < cells)


@QuickLaunch
@triton.jit
def _means_kernel(
    x, means, stride_batch, stride_head, stride_token, stride_dim, heads, prefix,
    frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw, grid_y, grid_x, cells,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The mean of one cell of one head."""
    cell, head = tl.program_id(0) % cells, (tl.program_id(0) // cells).to(tl.int64)
    first_t, nt, _ = _axis(cell // (grid_y * grid_x), frames, bt, many_t, ct)
    first_y, ny, _ = _axis(cell // grid_x % grid_y, height, bh, many_y, ch)
    first_x, nx, _ = _axis(cell % grid_x, width, bw, many_x, cw)
    dim = tl.arange(0, BLOCK_D)
    start = x + head // heads * stride_batch + head % heads * stride_head + dim[None, :] * stride_dim
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = nt * ny * nx
    for first in range(0, count, TOKENS):
        member = first + tl.arange(0, TOKENS)
        t, y, x_ = first_t + member // (ny * nx), first_y + member // nx % ny, first_x + member % nx
        token = (prefix + (t * height + y) * width + x_).to(tl.int64)
        inside = (member < count)[:, None] & (dim < D)[None, :]
        rows = tl.load(start + token[:, None] * stride_token, mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    mean = total / count.to(tl.float32)
    tl.store(means + (head * cells + cell) * D + dim, mean.to(means.dtype.element_ty), mask=dim < D)


@QuickLaunch
@triton.jit
def _backward_kernel(
    grad, whole, tokens, prefix, frames, height, width, bt, bh, bw, many_t, many_y, many_x, ct, ch, cw,
    grid_y, grid_x, cells, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each token's share of its cell's gradient; zero in prefix and suffix."""
    blocks = tl.cdiv(tokens, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    token = row - prefix
    video = (token >= 0) & (token < frames * height * width)
    token = tl.where(video, token, 0)
    t, y, x = token // (height * width), token // width % height, token % width
    cell_t, cell_y, cell_x = (
        t // bt * many_t + t % bt // ct,
        y // bh * many_y + y % bh // ch,
        x // bw * many_x + x % bw // cw,
    )
    _, nt, _ = _axis(cell_t, frames, bt, many_t, ct)
    _, ny, _ = _axis(cell_y, height, bh, many_y, ch)
    _, nx, _ = _axis(cell_x, width, bw, many_x, cw)
    cell = (cell_t * grid_y + cell_y) * grid_x + cell_x
    dim = tl.arange(0, BLOCK_D)[None, :]
    at = grad + (head * cells + cell)[:, None] * D + dim
    share = tl.load(at, mask=video[:, None] & (dim < D), other=0.0).to(tl.float32)
    share = share / (nt * ny * nx).to(tl.float32)[:, None]
    out = whole + (head * tokens + row)[:, None] * D + dim
    tl.store(out, share.to(whole.dtype.element_ty), mask=(row < tokens)[:, None] & (dim < D))


def _geometry(cells: Cells) -> tuple[int, ...]:
    partition = cells.partition
    return (*partition.grid, *partition.block, *cells.per_block, *cells.cell, *cells.grid[1:])


def cell_groups(cells: Cells, device: torch.device) -> list[Tensor]:
    """See ``cells.cell_groups``; the logs in float32."""
    bias = torch.empty(cells.total, dtype=torch.float32, device=device)
    group = torch.empty(cells.total, dtype=torch.int64, device=device)
    _groups_kernel[triton.cdiv(cells.total, 256),](
        bias, group, cells.total, *_geometry(cells), *cells.partition.cells[1:], BLOCK=256
    )
    return [bias, group]


def cell_means(x: Tensor, cells: Cells) -> Tensor:
    """See ``cells.cell_means``; any strides."""
    batch, heads, _, dim = x.shape
    means = torch.empty(batch, heads, cells.total, dim, dtype=x.dtype, device=x.device)
    tokens = min(_TOKENS, triton.next_power_of_2(math.prod(cells.cell)))
    _means_kernel[cells.total * batch * heads,](
        x, means, *x.stride(), heads, cells.partition.prefix, *_geometry(cells), cells.total,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), TOKENS=tokens,
    )  # fmt: skip
    return means


def cell_means_backward(grad: Tensor, cells: Cells) -> Tensor:
    """See ``cells.cell_means``; ``grad``: contiguous."""
    batch, heads, _, dim = grad.shape
    tokens = cells.partition.num_tokens
    whole = torch.empty(batch, heads, tokens, dim, dtype=grad.dtype, device=grad.device)
    _backward_kernel[batch * heads * triton.cdiv(tokens, 32),](
        grad, whole, tokens, cells.partition.prefix, *_geometry(cells), cells.total,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=32,
    )  # fmt: skip
    return whole
