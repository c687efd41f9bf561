"""What the layers of one model share: the grid that arrived, and the denoising step."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.config import VMoBAConfig


class StepSource:
    """A pipeline, whose scheduler counts the steps; copies and pickles of a model take no copy of it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_source, ()

    def read(self) -> tuple[int, int] | None:
        """The step that comes next, and the number of steps; None where the scheduler does not count, or is done."""
        pipe = self._pipe()
        scheduler: Any = getattr(pipe, "scheduler", None)
        # Diffusion forcing steps copies of its scheduler, which itself stays where it is.
        if not hasattr(scheduler, "step_index") or "DiffusionForcing" in type(pipe).__name__:
            return None
        index = scheduler.step_index
        if index is None:  # until the first step of a run is done
            index = getattr(scheduler, "begin_index", None) or 0
        num_steps = len(scheduler.timesteps)
        return (int(index), num_steps) if index < num_steps else None


def _no_source() -> None:
    return None


@dataclasses.dataclass
class ModelState:
    """The state that a model's root sets before each forward and its layers read.

    Attributes:
        config: what was applied.
        grid: latent video size after patching, of the forward under way; None before the first.
        blocks: the block shape of each kind on that grid.
        enabled: whether layers may be sparse at all.
        warmup: share of the way from full attention to the config's thresholds.
        step: the denoising step that comes next and the number of steps, where they were set by hand.
        source: where else they come from.
        flags: False and True as tensors on the CPU.
        processors: of the layers, in order.
        owner: what readies them before each forward.
        recorder: called with each layer's query and key, while these are captured.
        state: what the forward under way has set.
    """

    config: VMoBAConfig
    grid: tuple[int, int, int] | None = None
    blocks: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    enabled: bool = True
    warmup: float = 1.0
    step: tuple[int, int] | None = None
    source: StepSource | None = None
    flags: tuple[Tensor, Tensor] = dataclasses.field(default_factory=lambda: (torch.tensor(False), torch.tensor(True)))
    processors: list[Any] = dataclasses.field(default_factory=list)
    owner: Any = None
    recorder: Callable[..., None] | None = None
    state: tuple[Any, ...] = (None, {}, [], 1.0)

    def learn(self, grid: tuple[int, int, int]) -> None:
        """Sets the grid, and the blocks on it.

        Raises:
            ValueError: if a block exceeds the grid.
        """
        blocks = {}
        for kind in dict.fromkeys(self.config.cycle):
            try:
                blocks[kind] = self.config.partition(kind, grid).block
            except ValueError:
                if self.enabled:
                    raise
                blocks[kind] = grid  # nobody will be asked for it
        self.grid, self.blocks = grid, blocks

    def known_step(self) -> tuple[int, int] | None:
        """The step that comes next and the number of steps; None where nobody says."""
        return self.step or (self.source.read() if self.source else None)

    def current_step(self) -> tuple[int | None, int | None]:
        """The step that comes next and the number of steps.

        Raises:
            ValueError: if the config needs them and nobody says.
        """
        if not self.config.dense_steps:
            return None, None
        step = self.known_step()
        if step is None:
            raise ValueError(
                "config.dense_steps needs the denoising step: apply to a pipeline whose scheduler has a step_index, "
                f"pass callback_on_step_end=handle.on_step_end, or call handle.set_step; got {self.config.dense_steps}"
            )
        return step

    def keep(self) -> None:
        """Takes down what this forward has set, for layers that are computed again later."""
        self.state = self.grid, self.blocks, [processor.dense for processor in self.processors], self.warmup

    def restore(self, state: tuple[Any, ...]) -> None:
        """Sets what another forward had set."""
        self.state = self.grid, self.blocks, dense, warmup = state
        for processor, one in zip(self.processors, dense, strict=True):
            processor.set_dense(one)
            processor.warm(warmup)


class Checkpointing:
    """A model's function for gradient checkpointing, with the state of forward set again where layers are recomputed.

    Without it a second forward before backward would change what the first one's layers recompute.
    """

    def __init__(self, inner: Callable[..., Any], run: ModelState) -> None:
        self.inner, self.run = inner, run

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """The layer's output."""
        return self.inner(_Restoring(layer, self.run, self.run.state), *args)


class _Restoring:
    """A layer that runs in the state of the forward that made this."""

    def __init__(self, layer: Callable[..., Any], run: ModelState, state: tuple[Any, ...]) -> None:
        self.layer, self.run, self.state = layer, run, state

    def __call__(self, *args: Any) -> Any:
        now = self.run.state
        if now is self.state:
            return self.layer(*args)
        self.run.restore(self.state)
        try:
            return self.layer(*args)
        finally:
            self.run.restore(now)
