"""The problems of the table: tokens, heads, blocks and rule, and the sizes of one run."""

import dataclasses
import math

import torch

from bench.common.sizes import Sizes3
from vmoba_flex import BlockPartition, Tail
from vmoba_flex.rules import Rule


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: a shape, and for sparse attention its blocks and rule.

    Attributes:
        grid: latent video size ``(frames, height, width)``.
        heads: of query, key and value.
        block: block shape; None for dense attention.
        rule: None for dense attention.
        inputs: ``"random"``: neighbouring queries choose independently; ``"smooth"``: they mostly agree.
        tail: how skipped blocks take part; None if they do not.
    """

    grid: Sizes3
    heads: int
    block: Sizes3 | None = None
    rule: Rule | None = None
    inputs: str = "random"
    tail: Tail | None = None

    @property
    def tokens(self) -> int:
        """S."""
        return math.prod(self.grid)

    @property
    def partition(self) -> BlockPartition | None:
        """The blocks."""
        return BlockPartition(self.grid, self.block) if self.block else None

    @property
    def kind(self) -> str:
        """The paper's name for the block shape; empty for dense attention."""
        if self.block is None:
            return ""
        if self.block[1:] == self.grid[1:]:
            return "1D"
        return "2D" if self.block[0] == self.grid[0] else "3D"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one run of the command.

    Attributes:
        dtype: of query, key and value.
        head_dim: D.
        heads: fewer and more.
        grid: of the main section.
        blocks: its 1D, 2D and 3D block shapes.
        cells: windows along height and width, in sections that ask for windows: 48 in all.
        token_grids: of the tokens section, the most telling ones first.
        auto_grids: of the auto section.
        paper: grids with their three block shapes, and k for each where the paper gives one.
    """

    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    grid: Sizes3
    blocks: tuple[Sizes3, Sizes3, Sizes3]
    cells: tuple[int, int]
    token_grids: tuple[Sizes3, ...]
    auto_grids: tuple[Sizes3, ...]
    paper: tuple[tuple[Sizes3, tuple[Sizes3, Sizes3, Sizes3], tuple[int, int, int] | None], ...]

    def windows(self, grid: Sizes3) -> Sizes3:
        """The block shape of windows through all frames."""
        return grid[0], grid[1] // self.cells[0], grid[2] // self.cells[1]


FULL = Sizes(
    dtype=torch.bfloat16,
    head_dim=128,
    heads=(12, 40),
    grid=(24, 36, 64),
    blocks=((3, 36, 64), (24, 6, 8), (8, 12, 8)),
    cells=(6, 8),
    token_grids=((14, 24, 40), (20, 30, 56), (32, 48, 72), (24, 36, 64), (14, 18, 32), (10, 18, 24), (8, 12, 24)),
    auto_grids=((24, 36, 64), (14, 24, 40), (17, 24, 40), (21, 24, 40)),
    paper=(
        ((21, 30, 52), ((3, 30, 52), (21, 5, 13), (7, 5, 13)), (2, 6, 18)),
        ((21, 45, 80), ((3, 45, 80), (21, 9, 10), (7, 15, 20)), (2, 10, 9)),
        ((24, 36, 64), ((3, 36, 64), (24, 6, 8), (8, 12, 8)), None),
        ((36, 30, 52), ((3, 30, 52), (36, 5, 13), (12, 10, 13)), None),
    ),
)
SMALL = Sizes(
    dtype=torch.float32,
    head_dim=16,
    heads=(1, 2),
    grid=(5, 12, 16),
    blocks=((2, 12, 16), (5, 6, 4), (3, 6, 8)),
    cells=(2, 4),
    token_grids=((2, 6, 16), (5, 12, 16)),
    auto_grids=((2, 6, 16),),
    paper=(((3, 10, 13), ((1, 10, 13), (3, 5, 5), (2, 5, 7)), (2, 2, 3)),),
)
