"""Block shapes from a number of blocks, for grids that are known only once a video arrives."""

import dataclasses
import functools
import itertools
import math

from block_masks.launching.constant import constant_size, constant_when_compiled
from vmoba_flex.checks import check_positive

MAX_TOKENS = 2**31


@dataclasses.dataclass(frozen=True)
class ApproxBlocks:
    """About this many blocks; the grid that arrives decides their shape.

    The shape is the most even one among those whose number of blocks is within a tenth of ``count``. At the grids and
    counts of the paper's settings it is the paper's shape. In detail:

    1. Each axis that the kind of partition cuts is cut into cells as even as possible, in all numbers of cells.
    2. Of all such shapes, those count that have within a tenth of ``count`` blocks, or, where none has, the nearest.
    3. Of these the least elongated wins: the one with the smallest ratio of longest to shortest side, in tokens, where
       the shortest is taken over the axes that are truly cut. The ratio of a shape that does not divide the grid counts
       three times.
    4. Ties go to the nearest number of blocks, then to the smaller shape in frames, height, width.

    Attributes:
        count: blocks wanted, in 1..2**31 - 1. A grid of fewer tokens is cut into single tokens.

    Raises:
        TypeError: if ``count`` is not an int.
        ValueError: if ``count`` is out of range.
    """

    count: int

    def __post_init__(self) -> None:
        check_positive("count", self.count)
        if self.count >= MAX_TOKENS:
            raise ValueError(f"count must be below 2**31, got {self.count}")


def approx_block(count: int, grid: tuple[int, int, int], axes: tuple[int, ...]) -> tuple[int, int, int]:
    """The block shape that ``ApproxBlocks(count)`` stands for on a grid.

    Args:
        count: blocks wanted.
        grid: latent video size (frames, height, width) in tokens.
        axes: axes of the grid that are cut; the block is as long as the grid along the others.

    Returns:
        ``(bt, bh, bw)`` in tokens. A constant to ``torch.compile``, which makes one graph for each grid.

    Raises:
        ValueError: if the grid has 2**31 tokens or more.
    """
    frames, height, width = map(constant_size, grid)
    if frames * height * width >= MAX_TOKENS:
        raise ValueError(f"grid must have fewer than 2**31 tokens, got {grid}")
    return _constant(constant_size(count), (frames, height, width), axes)


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
    """``ceil(size / cells)`` for each number of cells: the shortest side, so that the last cell is as long as can be.

    Up to the square root these are the sides that give themselves back, and from there on those of few cells.
    """
    root = math.isqrt(size) + 1
    short = {side for side in range(1, root + 1) if -(-size // -(-size // side)) == side}
    return sorted(short | {-(-size // cells) for cells in range(1, root + 1)})
