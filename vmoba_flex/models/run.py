"""What the layers of one model share: the grid that arrived, and the denoising step."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.config import VMoBAConfig

_NO_STEP_INDEX = object()


class StepSource:
    """A pipeline's scheduler, of which copies and pickles of a model take no copy."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_source, ()

    def read(self) -> tuple[int, int] | None:
        """The step that comes next, and the number of steps; None where the scheduler does not count them."""
        scheduler = self._scheduler()
        index = getattr(scheduler, "step_index", _NO_STEP_INDEX)
        if index is _NO_STEP_INDEX:
            return None
        # None until the first step of a run is done.
        return int(index or 0), len(scheduler.timesteps)


def _no_source() -> None:
    return None


@dataclasses.dataclass
class Run:
    """The state that a model's root sets before each forward and its layers read.

    Attributes:
        config: what was applied.
        grid: latent video size after patching, of the forward under way; None before the first.
        blocks: the block shape of each kind on that grid.
        enabled: whether layers may be sparse at all.
        step: the denoising step that comes next and the number of steps, if they were set by hand.
        source: where else they come from.
        flags: False and True as tensors on the CPU.
    """

    config: VMoBAConfig
    grid: tuple[int, int, int] | None = None
    blocks: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    enabled: bool = True
    step: tuple[int, int] | None = None
    source: StepSource | None = None
    flags: tuple[Tensor, Tensor] = dataclasses.field(default_factory=lambda: (torch.tensor(False), torch.tensor(True)))

    def learn(self, grid: tuple[int, int, int]) -> None:
        """Sets the grid, and the blocks on it.

        Raises:
            ValueError: if a block exceeds the grid.
        """
        if grid != self.grid:
            # A new dictionary: a checkpointed forward may hold the old one.
            self.blocks = {kind: self.config.partition(kind, grid).block for kind in dict.fromkeys(self.config.cycle)}
            self.grid = grid

    def current_step(self) -> tuple[int | None, int | None]:
        """The step that comes next and the number of steps.

        Raises:
            ValueError: if the config needs them and nobody says.
        """
        if not self.config.dense_steps:
            return None, None
        step = self.step or (self.source and self.source.read())
        if step is None:
            raise ValueError(
                "config.dense_steps needs the denoising step: apply to a pipeline whose scheduler has a step_index, "
                f"pass callback_on_step_end=handle.on_step_end, or call handle.set_step; got {self.config.dense_steps}"
            )
        return step

    @contextmanager
    def restored(self, grid: tuple[int, int, int] | None, blocks: dict[str, tuple[int, int, int]]) -> Iterator[None]:
        """Sets the grid of an earlier forward, whose layers are computed again."""
        now = self.grid, self.blocks
        self.grid, self.blocks = grid, blocks
        try:
            yield
        finally:
            self.grid, self.blocks = now


class Checkpointing:
    """A model's function for gradient checkpointing, with the grid of forward set again where layers are recomputed."""

    def __init__(self, inner: Callable[..., Any], run: Run) -> None:
        self.inner, self.run = inner, run

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """The layer's output."""
        return self.inner(_Restoring(layer, self.run, self.run.grid, self.run.blocks), *args)


class _Restoring:
    """A layer that runs under the grid of the forward that made this."""

    def __init__(
        self, layer: Callable[..., Any], run: Run, grid: tuple[int, int, int] | None, blocks: dict[str, Any]
    ) -> None:
        self.layer, self.run, self.grid, self.blocks = layer, run, grid, blocks

    def __call__(self, *args: Any) -> Any:
        with self.run.restored(self.grid, self.blocks):
            return self.layer(*args)
