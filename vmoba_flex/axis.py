"""One axis of a grid, divided into blocks and their cells: plain numbers -> which block and cell a position is in."""

from typing import NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """Positions ``0..size - 1`` of an axis, in blocks. The last block of the axis, and of each period, may be shorter.

    Attributes:
        size: tokens along the axis.
        block: tokens of a block.
        period: blocks start anew after so many tokens; 0 if only at the axis' start.
    """

    size: int
    block: int
    period: int = 0

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return self.cells(self.block)

    def cells(self, cell: int) -> int:
        """How many cells of ``cell`` tokens, which start anew with each block."""
        if not self.period:
            return _cells(self.size, self.block, cell)
        rest = self.size % self.period
        whole = self.size // self.period * _cells(self.period, self.block, cell)
        return whole + (_cells(rest, self.block, cell) if rest else 0)

    @property
    def block_sizes(self) -> list[int]:
        """Tokens of each block."""
        period = self.period or self.size
        ends = [(first, min(first + period, self.size)) for first in range(0, self.size, period)]
        return [min(self.block, end - start) for first, end in ends for start in range(first, end, self.block)]

    def block_of(self, place: Tensor) -> Tensor:
        """The block of each position."""
        if not self.period:
            return place // self.block
        return place // self.period * -(-self.period // self.block) + place % self.period // self.block

    def first_of(self, place: Tensor) -> Tensor:
        """The first position of each position's block."""
        if not self.period:
            return place // self.block * self.block
        return place - place % self.period % self.block

    def tokens_from(self, first: Tensor) -> Tensor:
        """Tokens of the blocks that start at these positions; at least 1 where nothing does."""
        left = self.size - first
        if self.period:
            left = left.clamp(max=self.period - first % self.period)
        return left.clamp(min=1, max=self.block)

    def in_block(self, place: Tensor) -> Tensor:
        """Each position, counted from its block's first."""
        return (place % self.period if self.period else place) % self.block

    def cell_of(self, place: Tensor, cell: int) -> Tensor:
        """The cell of each position."""
        before = 0
        if self.period:
            before = place // self.period * _cells(self.period, self.block, cell)
            place = place % self.period
        return before + place // self.block * -(-self.block // cell) + place % self.block // cell


def axes_of(flat: list[int]) -> tuple[Axis, Axis, Axis]:
    """Frames, height and width of a partition's ``flat`` sizes, which may be symbolic.

    Blocks start anew with each chunk of frames where the chunk's length is no multiple of theirs.
    """
    t, y, x, bt, bh, bw = flat[:6]
    chunk = flat[8] if len(flat) > 8 else 0
    return Axis(t, bt, chunk if chunk % bt else 0), Axis(y, bh), Axis(x, bw)


def _cells(size: int, block: int, cell: int) -> int:
    """Cells of ``size`` tokens in blocks, of which only the last can be shorter."""
    before = (size - 1) // block
    return before * -(-block // cell) - (-(size - before * block) // cell)
