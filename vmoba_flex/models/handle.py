"""The handle of what has VMoBA applied: looks at it, switches it and removes it."""

from collections.abc import Callable
from typing import Any, Self

from torch import nn

from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.models.adapters import find_adapter
from vmoba_flex.models.applied import Applied
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.partition import BlockPartition
from vmoba_flex.warmup import check_warmup, warmed

# Where pipelines keep their transformers; Wan 2.2 has two experts.
_COMPONENTS = ("transformer", "transformer_2")


class VMoBAHandle:
    """VMoBA on a model, or on the models of a pipeline; a context manager that removes it at its end."""

    def __init__(self, applied: dict[str, tuple[nn.Module, Applied]]) -> None:
        self._applied = applied

    @classmethod
    def of(cls, pipe_or_model: Any) -> Self:
        """The handle of what has VMoBA applied, such as a copy of a model, or one that was pickled.

        Raises:
            TypeError: if the model is of an unknown class.
            ValueError: if VMoBA is not applied.
        """
        applied = {}
        for name, model in models_of(pipe_or_model).items():
            found = [layer.processor for _, layer in find_adapter(model).layers(model)]
            runs = [processor.run for processor in found if isinstance(processor, VMoBAProcessor)]
            if not runs:
                raise ValueError(f"{name} must have VMoBA applied, got none")
            applied[name] = model, runs[0].owner
        return cls(applied)

    def runs(self) -> dict[str, ModelState]:
        """What the layers of each model share, by the model's name."""
        return {name: applied.run for name, (_, applied) in self._applied.items()}

    def summary(self) -> str:
        """A table: each layer with its kind, blocks, rule, whether it is dense, and what it attended last."""
        return "\n".join(line for name, (_, applied) in self._applied.items() for line in _table(name, applied))

    def set_enabled(self, enabled: bool) -> None:
        """Makes all layers dense from the next forward on, or as the config has them again.

        Raises:
            TypeError: if ``enabled`` is no bool.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be a bool, got {enabled!r}")
        for _, applied in self._applied.values():
            applied.run.enabled = enabled

    def set_warmup(self, share: float) -> None:
        """Sets how far thresholds are on their way from full attention, from the next forward on; see ``Warmup``.

        Call it before the first forward: until it was called once, taus are constants of compiled graphs. After that no
        graph is made anew, but one for full attention and one for sparse. Not inside a CUDA graph.

        Args:
            share: 0 for full attention, up to 1 for the config's thresholds.

        Raises:
            TypeError: if ``share`` is no number.
            ValueError: if it is not in [0, 1], or a layer has a ``TopK``.
        """
        check_warmup(share)
        runs = self.runs().values()
        rules = [[warmed(processor.rule) for processor in run.processors] for run in runs]  # checked before any change
        for run, of_run in zip(runs, rules, strict=True):
            run.warmup = share
            for processor, rule in zip(run.processors, of_run, strict=True):
                processor.rule = rule

    def set_step(self, step: int | None, num_steps: int = 1) -> None:
        """Says which denoising step comes next, from 0, and how many there are, until it is called again.

        With ``None`` a pipeline's scheduler says so again.

        Raises:
            TypeError: if one is no int.
            ValueError: if ``step`` is not in 0..num_steps - 1.
        """
        if step is None:
            self._set_step(None)
            return
        check_positive("num_steps", num_steps)
        check_count("step", step, num_steps, "num_steps")
        self._set_step((step, num_steps))

    @property
    def on_step_end(self) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        """A pipeline's ``callback_on_step_end``, for schedulers without a ``step_index``; starts at step 0.

        Where a run was broken off, call ``set_step(0, ...)`` before the next one.
        """
        self.set_step(0, 1)  # dense for any number of dense steps, and for any share of them
        return self._end_step

    def remove(self) -> None:
        """Puts the stock processors back. The model then computes what it did before, bit for bit."""
        for model, applied in self._applied.values():
            applied.remove(model)
        self._applied = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _end_step(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        num_steps = pipe.num_timesteps
        # Behind the last step: the next run may count its steps by itself.
        self._set_step((step + 1, num_steps) if step + 1 < num_steps else None)
        return callback_kwargs

    def _set_step(self, step: tuple[int, int] | None) -> None:
        for _, applied in self._applied.values():
            applied.run.step = step


def models_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models that take VMoBA, by name: a pipeline's transformers, or the model itself.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(pipe_or_model, nn.Module):
        return {"model": pipe_or_model}
    found = {name: getattr(pipe_or_model, name, None) for name in _COMPONENTS}
    models = {name: model for name, model in found.items() if model is not None}
    if not models:
        raise TypeError(
            f"pipe_or_model must be a model, or have one as {' or '.join(_COMPONENTS)}, got "
            f"{type(pipe_or_model).__name__}"
        )
    return models


def _table(name: str, applied: Applied) -> list[str]:
    run = applied.run
    rows = [("layer", "kind", "blocks", "rule", "attention", "last density")]
    for layer, processor in zip(applied.names, applied.processors, strict=True):
        block = run.blocks.get(processor.kind)
        blocks = "not known yet"
        if run.grid is not None and block is not None:
            blocks = f"{BlockPartition(run.grid, block).num_blocks} of {'x'.join(map(str, block))}"
        density = processor.density.item()
        last = f"{density:.3f}" if density else "-"
        attention = "dense" if processor.dense else "sparse"
        rows.append((layer, processor.kind, blocks, repr(processor.rule), attention, last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    grid = "no forward yet" if run.grid is None else f"grid {'x'.join(map(str, run.grid))}"
    return [f"{name}: {grid}", *lines]
