"""Means of a partition's cells, as the coarse keys of attention.

Shapes: ``B`` batch, ``H`` heads, ``S`` tokens, ``C`` cells, ``D`` head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from block_masks import CoarseKeys
from block_masks.launching.device import on_device
from block_masks.launching.transforms import in_transform
from vmoba_flex.axis import Axis, axes_of
from vmoba_flex.partition import BlockPartition
from vmoba_flex.tail import Cells, Tail

_KERNEL_MAX_DIM = 256


def coarse_keys(key: Tensor, value: Tensor, partition: BlockPartition, tail: Tail) -> CoarseKeys:
    """The cells of all blocks, as keys that ``block_masks`` merges in where a query did not choose their block.

    Args:
        key: ``(B, key heads, S, D)`` in raster order, prefix and suffix included.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks.
        tail: their cells.

    Returns:
        ``B * key heads`` heads of ``C`` keys. Differentiable in key and value.
    """
    cells = Cells(partition, tail.cell_of(partition))
    bias, group = cell_groups(cells, key)
    return CoarseKeys(cell_means(key, cells).flatten(0, 1), cell_means(value, cells).flatten(0, 1), bias, group)


def cell_groups(cells: Cells, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of each cell the log of its tokens and its block, on the device of ``like``.

    Returns:
        float32 ``(C,)``, or float64 for float64, and int64 ``(C,)``.
    """
    # Only its dtype and device are read, and a new tensor is no one's batch.
    bias, group = _cell_groups(
        torch.empty(0, dtype=like.dtype, device=like.device), cells.partition.flat, list(cells.cell)
    )
    return bias, group


def cell_ids(cells: Cells, device: torch.device) -> Tensor:
    """The cell of each video token in raster order, int64 ``(video tokens,)``."""
    (t, y, x), (_, cells_y, cells_x) = _axis_cells(cells, device), cells.grid
    return ((t[:, None, None] * cells_y + y[:, None]) * cells_x + x).flatten()


def cell_means(x: Tensor, cells: Cells) -> Tensor:
    """The mean over each cell's tokens, taken in float32 at least. Differentiable.

    Args:
        x: ``(B, H, S, D)`` in raster order, prefix and suffix included.
        cells: of its tokens.

    Returns:
        ``(B, H, C, D)`` in the dtype of ``x``.
    """
    if in_transform(x):
        return plain_means(x, cells)
    return _cell_means(x, cells.partition.flat, list(cells.cell))


# Opaque to Inductor, so that the means are the same bits in all graphs.
@torch.library.custom_op("vmoba_flex::cell_groups", mutates_args=())
@on_device
def _cell_groups(like: Tensor, partition: list[int], cell: list[int]) -> list[Tensor]:
    cells = cells_of(partition, cell)
    if has_kernels(like):
        from vmoba_flex import cell_kernels

        return cell_kernels.cell_groups(cells, like.device)
    t, y, x = (
        _axis_blocks(axis, cell, like.device) for axis, cell in zip(cells.partition.axes, cells.cell, strict=True)
    )
    _, blocks_y, blocks_x = cells.partition.cells
    group = (t[:, None, None] * blocks_y + y[:, None]) * blocks_x + x
    return [_tokens(cells, like.device).to(_accumulator(like)).log(), group.flatten()]


@_cell_groups.register_fake
def _(like: Tensor, partition: list[int], cell: list[int]) -> list[Tensor]:
    count = count_cells(partition, cell)
    return [like.new_empty(count, dtype=_accumulator(like)), like.new_empty(count, dtype=torch.int64)]


@torch.library.custom_op("vmoba_flex::cell_means", mutates_args=())
@on_device
def _cell_means(x: Tensor, partition: list[int], cell: list[int]) -> Tensor:
    cells = cells_of(partition, cell)
    if has_kernels(x):
        from vmoba_flex import cell_kernels

        return cell_kernels.cell_means(x, cells)
    return plain_means(x, cells)


def plain_means(x: Tensor, cells: Cells) -> Tensor:
    """``cell_means`` in plain PyTorch."""
    first, count = cells.partition.prefix, cells.partition.num_video_tokens
    sums = x[:, :, first : first + count].to(_accumulator(x)).unflatten(2, cells.partition.grid)
    for axis, (ids, size) in enumerate(zip(_axis_cells(cells, x.device), cells.grid, strict=True)):
        shape = list(sums.shape)
        shape[2 + axis] = size
        sums = sums.new_zeros(shape).index_add(2 + axis, ids, sums)
    return (sums.flatten(2, 4) / _tokens(cells, x.device)[:, None]).to(x.dtype)


@_cell_means.register_fake
def _(x: Tensor, partition: list[int], cell: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], count_cells(partition, cell), x.shape[3])


@torch.library.custom_op("vmoba_flex::cell_means_backward", mutates_args=())
@on_device
def _cell_means_backward(grad: Tensor, partition: list[int], cell: list[int]) -> Tensor:
    cells = cells_of(partition, cell)
    if has_kernels(grad):
        from vmoba_flex import cell_kernels

        return cell_kernels.cell_means_backward(grad, cells)
    return plain_spread(grad, cells)


def plain_spread(grad: Tensor, cells: Cells) -> Tensor:
    """Each token's share of the gradient ``(B, H, C, D)`` of its cell's mean; zero in prefix and suffix."""
    shares = grad.to(_accumulator(grad)) / _tokens(cells, grad.device)[:, None]
    shares = shares.to(grad.dtype).unflatten(2, cells.grid)
    for axis, ids in enumerate(_axis_cells(cells, grad.device)):
        shares = shares.index_select(2 + axis, ids)
    whole = grad.new_zeros(*grad.shape[:2], cells.partition.num_tokens, grad.shape[3])
    whole.narrow(2, cells.partition.prefix, cells.partition.num_video_tokens).copy_(shares.flatten(2, 4))
    return whole


@_cell_means_backward.register_fake
def _(grad: Tensor, partition: list[int], cell: list[int]) -> Tensor:
    t, y, x, _, _, _, prefix, suffix = partition[:8]
    return grad.new_empty(*grad.shape[:2], prefix + t * y * x + suffix, grad.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.where = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _cell_means_backward(grad.contiguous(), *ctx.where), None, None


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _cell_means(grad.contiguous(), *ctx.where), None, None


# Means are linear: each is the other's adjoint.
_cell_means.register_autograd(_backward, setup_context=_save)
_cell_means_backward.register_autograd(_double_backward, setup_context=_save)


def cells_of(partition: list[int], cell: list[int]) -> Cells:
    """The cells that an op was given."""
    return Cells(BlockPartition.of_flat(partition), (cell[0], cell[1], cell[2]))


def count_cells(partition: list[int], cell: list[int]) -> int:
    """As ``Cells.total``; sizes may be symbolic here, and of these no partition can be made."""
    return math.prod([axis.cells(size) for axis, size in zip(axes_of(partition), cell, strict=True)])


def _axis_cells(cells: Cells, device: torch.device) -> list[Tensor]:
    """The cell of each position along frames, height and width, int64."""
    axes = zip(cells.partition.axes, cells.cell, strict=True)
    return [axis.cell_of(torch.arange(axis.size, device=device), cell) for axis, cell in axes]


def _axis_blocks(axis: Axis, cell: int, device: torch.device) -> Tensor:
    """The block of each cell along an axis, int64."""
    if not axis.period:
        return torch.arange(axis.cells(cell), device=device) // -(-axis.block // cell)
    place = torch.arange(axis.size, device=device)
    return place.new_zeros(axis.cells(cell)).scatter(0, axis.cell_of(place, cell), axis.block_of(place))


def _tokens(cells: Cells, device: torch.device) -> Tensor:
    """Tokens in each cell, int64 ``(C,)``."""
    places = zip(_axis_cells(cells, device), cells.grid, strict=True)
    # bincount would read from a GPU how many cells there are.
    t, y, x = (ids.new_zeros(size).index_add_(0, ids, torch.ones_like(ids)) for ids, size in places)
    return (t[:, None, None] * y[:, None] * x).flatten()


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels take tokens like these."""
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _KERNEL_MAX_DIM


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
