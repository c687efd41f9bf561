"""What each layer of a pipeline attends at each step of a denoise."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vmoba_flex.models.handle import VMoBAHandle, models_of


@dataclasses.dataclass(frozen=True)
class LayerSteps:
    """What one layer did over the steps of a denoise.

    Attributes:
        model: the pipeline's name for the model.
        layer: its index, from 0.
        kind: of its blocks.
        density: share of the (query, block) pairs that it attended at each step, mean over the step's passes; 1 where
            it was dense, None at steps in which the model did not run.
        recall: share of full attention's mass on what it attended, where that was measured.
    """

    model: str
    layer: int
    kind: str
    density: tuple[float | None, ...]
    recall: float | None = None


class Densities:
    """Notes each layer's density after each forward, on the device; read once, at the end.

    Attributes:
        step: of the forwards to come, from 0.
    """

    def __init__(self, pipe: Any, handle: VMoBAHandle) -> None:
        self.step = 0
        self._models, self._states = models_of(pipe), handle.states()
        self._seen: list[tuple[str, int, Tensor]] = []

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Notes while it lasts."""
        hooks = [model.register_forward_hook(self._note(name)) for name, model in self._models.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def layers(self) -> tuple[LayerSteps, ...]:
        """What was noted, layer by layer."""
        found = []
        for name, state in self._states.items():
            by_step: dict[int, list[Tensor]] = {}
            for model, step, densities in self._seen:
                if model == name:
                    by_step.setdefault(step, []).append(densities)
            means = {step: torch.stack(all_passes).mean(0).tolist() for step, all_passes in by_step.items()}
            steps = range(1 + max((step for _, step, _ in self._seen), default=-1))
            for i, processor in enumerate(state.processors):
                density = tuple(means[step][i] if step in means else None for step in steps)
                found.append(LayerSteps(name, i, processor.kind, density))
        return tuple(found)

    def _note(self, name: str) -> Any:
        def note(model: nn.Module, *_: Any) -> None:
            now = [processor.density for processor in self._states[name].processors]
            self._seen.append((name, self.step, torch.stack(now).detach()))

        return note
