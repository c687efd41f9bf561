"""Block shapes from a number of blocks, for grids that are known only once a video arrives."""

import dataclasses
import functools
import itertools
import math

from block_masks.launching.constant import constant_when_compiled
from vmoba_flex.checks import check_positive


@dataclasses.dataclass(frozen=True)
class ApproxBlocks:
    """About this many blocks; the grid that arrives decides their shape.

    Each axis that the kind of partition cuts is cut into cells as even as can be. Of all such shapes, those count whose
    number of blocks is within a tenth of ``count``, or the nearest where there are none. Of these the least elongated
    is taken (as square, or as close to a cube, as can be, in tokens): that of the least longest side over shortest
    side, where the shortest is of the axes that are truly cut, and where the ratio counts three times if the shape does
    not divide the grid. Ties go to the nearest number of blocks, then to the shape that is smaller in frames, height,
    width. At the grids and counts of the paper's settings this gives the paper's shapes.

    Attributes:
        count: blocks to come near to, at least 1. A grid of fewer tokens is cut into single tokens.

    Raises:
        TypeError: if ``count`` is not an int.
        ValueError: if ``count`` is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        check_positive("count", self.count)


def approx_block(count: int, grid: tuple[int, int, int], axes: tuple[int, ...]) -> tuple[int, int, int]:
    """The block shape that ``ApproxBlocks(count)`` stands for on a grid.

    Args:
        count: blocks to come near to.
        grid: latent video size (frames, height, width) in tokens.
        axes: axes of the grid that are cut; the block is as long as the grid along the others.

    Returns:
        ``(bt, bh, bw)`` in tokens. A constant to ``torch.compile``, which makes one graph for each grid.
    """
    frames, height, width = (len(range(size)) for size in grid)  # int() would leave a symbolic size symbolic
    return _constant(count, (frames, height, width), axes)


# Two functions, because torch.compile traces into a cached one even if it is marked as a constant.
@constant_when_compiled
def _constant(count: int, grid: tuple[int, int, int], axes: tuple[int, ...]) -> tuple[int, int, int]:
    return _search(count, grid, axes)


@functools.lru_cache
def _search(count: int, grid: tuple[int, int, int], axes: tuple[int, ...]) -> tuple[int, int, int]:
    def distance(block: tuple[int, ...]) -> int:
        return abs(math.prod(-(-size // side) for size, side in zip(grid, block, strict=True)) - count)

    def elongation(block: tuple[int, ...]) -> float:
        longest = max(block[axis] for axis in axes)
        shortest = min((block[axis] for axis in axes if block[axis] < grid[axis]), default=longest)
        divides = all(size % side == 0 for size, side in zip(grid, block, strict=True))
        return longest / shortest * (1 if divides else 3)

    sides = [_even_sides(size) if axis in axes else [size] for axis, size in enumerate(grid)]
    blocks = list(itertools.product(*sides))
    near = max(min(map(distance, blocks)), count / 10)
    bt, bh, bw = min((b for b in blocks if distance(b) <= near), key=lambda b: (elongation(b), distance(b), b))
    return bt, bh, bw


def _even_sides(size: int) -> list[int]:
    """The shortest side for each number of cells: the one that leaves the last cell longest."""
    return sorted({-(-size // cells) for cells in range(1, size + 1)})
