"""A partition's cells -> their places, block by block, and what is known of the keys in them.

Each block has P places, N P in all: the cells of a whole block in raster order, then empty ones. A block that the grid
cuts short has empty places among its others, where a whole block has a cell.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmoba_flex.partition import BlockPartition
from vmoba_flex.tail import Cells, Tail

# P is a power of two up to this, and above it a multiple, which is what a tile of the kernel holds.
TILE_CELLS = 64
# A smaller variance of scores counts as this one: it is rounding of float32, and its logarithm must stay finite.
LEAST_VARIANCE = 1e-12


class CellStats(NamedTuple):
    """What the keys of each cell are like. Empty places have a bias of -inf, and zeros.

    Attributes:
        mean: ``(B, key heads, N P, D)``, rounded once to key's dtype.
        variance: of the keys inside the cell, along each dim; of the same shape and dtype. Where it exceeds the dtype's
            largest number, that number.
        bias: float32 or float64 ``(N P,)``, the log of the cell's tokens.
    """

    mean: Tensor
    variance: Tensor
    bias: Tensor


def gate_cells(partition: BlockPartition) -> Cells:
    """The cells that the gates look at: those of ``Tail()``."""
    return Cells(partition, Tail().cell_of(partition))


def places_of_block(per_block: tuple[int, ...]) -> int:
    """P, where a whole block has so many cells along each axis."""
    cells = math.prod(per_block)
    if cells > TILE_CELLS:
        return -(-cells // TILE_CELLS) * TILE_CELLS
    return 1 << (cells - 1).bit_length()


def place_of_token(cells: Cells, device: torch.device) -> Tensor:
    """The place of each video token's cell, int64 ``(video tokens,)`` in raster order."""
    partition, (_, many_y, many_x) = cells.partition, cells.per_block
    axes = zip(partition.axes, cells.cell, strict=True)
    t, y, x = (axis.in_block(torch.arange(axis.size, device=device)) // cell for axis, cell in axes)
    in_block = (t[:, None, None] * many_y + y[:, None]) * many_x + x
    return partition.block_ids(device) * places_of_block(cells.per_block) + in_block.flatten()
