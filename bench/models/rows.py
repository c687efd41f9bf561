"""The rows of the table: which attention runs in which model, and which rows matter most."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from bench.common.sizes import Sizes3
from bench.models.report import CHECKPOINTED, FORWARD, NO_ATTENTION, PLAIN
from bench.models.shapes import Model, ModelSizes


@dataclasses.dataclass(frozen=True)
class Attention:
    """What replaces the self-attention of a model.

    Attributes:
        name: in the table.
        backend: diffusers' name of a dense attention.
        dispatch: of an attention of ours.
        density: of an attention of ours, if not that of the paper's rules.
        tail: whether skipped blocks take part by cells.
    """

    name: str
    backend: str = ""
    dispatch: str = ""
    density: float | None = None
    tail: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether this is full attention by others."""
        return not self.dispatch and self.name != NONE.name


EXACT, PACKED, SHARED = (
    Attention("exact", dispatch="auto"),
    Attention("exact, packed", dispatch="packed"),
    Attention("shared", dispatch="shared"),
)
TAILED, LOWEST = (
    tuple(
        Attention(f"{name}, density {density:g} + tail", dispatch=dispatch, density=density, tail=True)
        for name, dispatch in (("exact", "auto"), ("shared", "shared"))
    )
    for density in (0.125, 0.0625)
)
NONE = Attention(NO_ATTENTION)
FLASH_4 = Attention("FlashAttention-4")
# The first is diffusers' fastest; the second only tells by how much two correct ones differ.
STOCK = {
    "cuda": (Attention("cuDNN", backend="_native_cudnn"), Attention("FlashAttention-2", backend="_native_flash")),
    "cpu": (Attention("SDPA", backend="native"), Attention("math", backend="_native_math")),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row to measure: a model on a grid, in a mode, with an attention."""

    model: Model
    grid: Sizes3
    mode: str
    attention: Attention

    @property
    def tokens(self) -> int:
        """Of the video."""
        return math.prod(self.grid)

    @property
    def id(self) -> str:
        """The same for the same measurement."""
        return " | ".join([self.model.name, f"{self.tokens} tokens", self.mode, self.attention.name])

    @property
    def compiled_as(self) -> tuple[Any, ...]:
        """Rows share their compiled blocks where this is equal."""
        return self.model.name, self.grid, self.attention, self.mode == FORWARD


def shared_out(rows: Iterable[Spec], index: int, count: int) -> list[Spec]:
    """The ``index``-th of ``count`` shares of the rows; rows of one model and grid stay together."""
    shapes: dict[tuple[str, Sizes3], int] = {}
    return [row for row in rows if shapes.setdefault((row.model.name, row.grid), len(shapes)) % count == index]


def specs(sizes: ModelSizes, device: str) -> Iterator[Spec]:
    """All rows, the most urgent first; rows that share compiled blocks stand together."""
    cudnn, wan, others = STOCK[device][0], sizes.models[0], sizes.models[1:]
    compared = (cudnn, EXACT, SHARED)
    others_too = (NONE, FLASH_4) if device == "cuda" else (NONE,)
    few, known, more, large, most = sizes.grids
    training = (CHECKPOINTED, PLAIN)

    def rows(model: Model, grid: Sizes3, modes: tuple[str, ...], attentions: tuple[Attention, ...]) -> Iterator[Spec]:
        for attention in attentions:
            yield from (Spec(model, grid, mode, attention) for mode in modes)

    # Without checkpointing, grids above `known` do not fit in memory with 30 layers; such rows come last.
    goals = ((more, (CHECKPOINTED,)), (known, training), (few, training), (large, (FORWARD,)))
    for attentions in (compared, TAILED, others_too):
        for grid, modes in goals:
            yield from rows(wan, grid, modes, attentions)
    yield from rows(wan, large, (FORWARD,), LOWEST)
    everything = (*compared, *others_too, *TAILED)
    for grid in (more, known):
        yield from rows(wan, grid, (FORWARD,), everything)
    for grid in (large, most):
        yield from rows(wan, grid, (CHECKPOINTED,), everything)
    for grid in (most, few):
        yield from rows(wan, grid, (FORWARD,), everything)
    for grid in (more, large, known, most, few):
        for model in others:
            yield from rows(model, grid, training, everything)
            yield from rows(model, grid, (FORWARD,), everything)
    for model, grid in sizes.more:
        yield from rows(model, grid, (CHECKPOINTED, FORWARD), everything)
    # Where "auto" stays dense.
    yield from rows(wan, few, (*training, FORWARD), (PACKED,))
    for grid in (more, large, most):
        yield from rows(wan, grid, (PLAIN,), everything)
