"""The rows of the table: which attention runs on how many tokens and GPUs, and which rows matter most."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from bench.common.sizes import Sizes3
from bench.distributed.report import STEP
from vmoba_flex import BlockPartition, Threshold, TopK
from vmoba_flex.call import Dispatch

RULE = Threshold(0.25, pool="head", max_density=0.25)


@dataclasses.dataclass(frozen=True)
class DistributedSizes:
    """The sizes of one run of the command.

    Attributes:
        dtype: of query, key and value.
        heads: of all GPUs.
        head_dim: D.
        grids: latent video sizes from small to large, with 48 windows through all frames.
        windows: along height and width.
    """

    dtype: torch.dtype
    heads: int
    head_dim: int
    grids: tuple[Sizes3, ...]
    windows: tuple[int, int]

    def partition(self, grid: Sizes3) -> BlockPartition:
        """The blocks of a row."""
        return BlockPartition.spatial(grid, (grid[1] // self.windows[0], grid[2] // self.windows[1]))


FULL = DistributedSizes(torch.bfloat16, 12, 128, ((24, 36, 64), (32, 48, 72), (48, 72, 64)), (6, 8))
SMALL = DistributedSizes(torch.float32, 4, 16, ((3, 12, 16), (4, 12, 16)), (3, 4))


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row to measure; ``model`` is ``STEP`` for a training step, and empty for attention.

    With ``tail``, skipped blocks take part by cells.
    """

    attention: Dispatch
    grid: Sizes3
    gpus: int
    model: str = ""
    tail: bool = False

    @property
    def rule(self) -> Threshold | TopK:
        """The paper's, or half of its density next to a tail."""
        return TopK(density=0.125) if self.tail else RULE

    @property
    def tokens(self) -> int:
        """Of all GPUs."""
        return math.prod(self.grid)

    @property
    def id(self) -> str:
        """The same for the same measurement."""
        what = f"{self.model}, {self.attention}" if self.model else self.attention
        return f"{what}{', tail' * self.tail} | {self.tokens} tokens | {self.gpus} GPUs"


def specs(sizes: DistributedSizes, gpus: list[int]) -> Iterator[Spec]:
    """All rows, the most urgent first."""
    few, *more = sizes.grids

    def rows(attention: Dispatch, grid: Sizes3, model: str = "") -> Iterator[Spec]:
        yield from (Spec(attention, grid, n, model) for n in gpus)

    yield from rows("packed", few)
    yield from rows("packed", more[0])
    yield from rows("packed", few, STEP)
    for grid in (few, more[0]):
        yield from rows("dense", grid)
    yield from rows("dense", few, STEP)
    for attention in ("packed", "dense"):
        for grid in more[1:]:
            yield from rows(attention, grid)
    for grid in (few, more[0]):
        yield from rows("shared", grid)
    for attention in ("packed", "shared"):
        yield from (Spec(attention, few, n, tail=True) for n in gpus)
    # On few GPUs a step of the largest grid takes minutes.
    for attention in ("packed", "dense"):
        for grid in more[1:]:
            yield Spec(attention, grid, max(gpus), STEP)
    for attention in ("packed", "dense"):
        yield from rows(attention, more[0], STEP)
