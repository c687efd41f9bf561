"""The tail: blocks that a query did not choose take part in its softmax by the means of their cells."""

import dataclasses
import math
from typing import Self

from block_masks.launching.constant import constant_size
from vmoba_flex.approx_blocks import MAX_TOKENS, approx_block
from vmoba_flex.checks import check_positive, check_sizes
from vmoba_flex.partition import BlockPartition

Sizes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Tail:
    """Skipped blocks take part: one key for each of their cells, in the softmax of the keys that are attended exactly.

    Each block is cut into cells, from the block's own corner; cells at its far edges are smaller where the cell does
    not divide it. For a query, each cell of a block that it did not choose joins the softmax as one key, with logit
    ``scale * query . mean key + log(tokens in the cell)`` and the cell's mean value. Chosen blocks, prefix and suffix
    are attended exactly; prefix and suffix queries attend everything exactly. Means are taken in float32, and rounded
    once to the dtype of key and value. Gradients flow through them to every key and value.

    So cells of one token, keys and values that are constant within each cell, or a rule that chooses everything give
    full attention.

    Attributes:
        cell: tokens of a cell along frames, height and width, at most the block's; or about how many tokens a cell
            has, and then the block decides the shape: as close to a cube as can be.

    Raises:
        TypeError: if ``cell`` is neither an int nor three ints.
        ValueError: if a size is below 1, or a number of tokens is 2**31 or more.

    Example:
        >>> from vmoba_flex import BlockPartition, Tail
        >>> Tail().cell_of(BlockPartition.spatiotemporal((24, 36, 64), (8, 12, 8)))
        (4, 4, 4)
    """

    cell: int | Sizes = 64

    def __post_init__(self) -> None:
        if isinstance(self.cell, tuple | list):
            object.__setattr__(self, "cell", check_sizes("cell", self.cell))
        elif isinstance(self.cell, bool) or not isinstance(self.cell, int):
            raise TypeError(f"cell must be an int or a tuple of 3 ints, got {self.cell!r}")
        else:
            check_positive("cell", self.cell)
            if self.cell >= MAX_TOKENS:
                raise ValueError(f"cell must be below 2**31, got {self.cell}")

    def cell_of(self, partition: BlockPartition) -> Sizes:
        """Tokens of a cell ``(ct, ch, cw)`` in the blocks of a partition.

        Raises:
            TypeError: if ``partition`` is no ``BlockPartition``.
            ValueError: if the cell is larger than a block.
        """
        if not isinstance(partition, BlockPartition):
            raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
        if isinstance(self.cell, tuple):
            if any(cell > side for cell, side in zip(self.cell, partition.block, strict=True)):
                raise ValueError(
                    f"cell must not be larger than block {partition.block}, got {self.cell}: give a number of tokens, "
                    "as in Tail(64), to have a shape for each block"
                )
            t, y, x = map(constant_size, self.cell)
            return t, y, x
        tokens = math.prod(partition.block)
        return approx_block(max(1, round(tokens / constant_size(self.cell))), partition.block, (0, 1, 2))

    @property
    def flat(self) -> list[int]:
        """As ops take it; ``of_flat`` takes it back."""
        return list(self.cell) if isinstance(self.cell, tuple) else [self.cell]

    @classmethod
    def of_flat(cls, flat: list[int]) -> Self | None:
        """The tail that an op was given, none of an empty list."""
        if not flat:
            return None
        return cls(flat[0] if len(flat) == 1 else (flat[0], flat[1], flat[2]))


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of a partition, in raster order of their grid.

    Along an axis of ``size`` tokens in blocks of ``block``, token p lies in cell
    ``p // block * cells a block + p % block // cell``; only the last block, of each chunk too, can be shorter.

    Attributes:
        partition: the blocks.
        cell: tokens of a cell ``(ct, ch, cw)``.
    """

    partition: BlockPartition
    cell: Sizes

    @property
    def per_block(self) -> Sizes:
        """Cells of a whole block along each axis."""
        t, y, x = (-(-block // cell) for block, cell in zip(self.partition.block, self.cell, strict=True))
        return t, y, x

    @property
    def grid(self) -> Sizes:
        """Cells along frames, height and width."""
        t, y, x = (axis.cells(cell) for axis, cell in zip(self.partition.axes, self.cell, strict=True))
        return t, y, x

    @property
    def total(self) -> int:
        """C, the number of cells."""
        return math.prod(self.grid)
