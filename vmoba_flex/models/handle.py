"""The handle of what has VMoBA applied: looks at it, switches it and removes it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from vmoba_flex.by_steps import values_of
from vmoba_flex.checks import check_choice, check_count, check_positive
from vmoba_flex.config_fields import rules_of_layers
from vmoba_flex.models.adapters import find_adapter, unwrap
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import Grid, ModelState
from vmoba_flex.models.steps import Step, first_call, schedule_of, step_at
from vmoba_flex.models.summary import table_of
from vmoba_flex.partition import BlockPartition
from vmoba_flex.warmup import check_warmup, warmed

if TYPE_CHECKING:  # loads torch._dynamo
    from vmoba_flex.models.applied import Applied

# Where pipelines keep their transformers; Wan 2.2 has two experts, and MiniMax-H3 one for references.
_COMPONENTS = ("transformer", "transformer_2", "transformer_ref")


class VMoBAHandle:
    """VMoBA on a model, or on the models of a pipeline; a context manager that removes it at its end."""

    def __init__(self, applied: "dict[str, tuple[nn.Module, Applied]]") -> None:
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
            found = [layer.processor for _, layer in find_adapter(model).layers_of(model)]
            states = [processor.state for processor in found if isinstance(processor, VMoBAProcessor)]
            if not states:
                raise ValueError(f"{name} must have VMoBA applied, got none")
            applied[name] = model, states[0].owner
        return cls(applied)

    def states(self) -> dict[str, ModelState]:
        """The state of each model, by the model's name."""
        return {name: applied.state for name, (_, applied) in self._applied.items()}

    def summary(self) -> str:
        """A table: what each layer is to do and what it ran last, with the reason where that is not what was asked for.

        Attention is ``dense``, ``sparse`` where the rule's own gate chose, or ``remembered``. The same is logged at
        level INFO, once for each grid and way to run, without the densities, which are read from the device.
        """
        tables = (table_of(name, model, one.names, one.state) for name, (model, one) in self._applied.items())
        return "\n".join(line for table in tables for line in table)

    def set_enabled(self, enabled: bool) -> None:
        """Makes all layers dense from the next forward on, or as the config has them again.

        Raises:
            TypeError: if ``enabled`` is no bool.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be a bool, got {enabled!r}")
        for state in self.states().values():
            state.enabled = enabled

    def set_grid(self, grid: Grid | None, *, rest: Literal["prefix", "suffix"] = "prefix") -> None:
        """Sets the latent video size by hand, from the next forward on.

        For a model that is not told its grid, and for frames that condition the video and are to be no part of its
        blocks: the tokens that are not the grid's attend all, and all attend them.

        Args:
            grid: in tokens: frames, height, width; None leaves it to each forward again.
            rest: whether tokens that are not the grid's lie before the video or after it.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if it has a wrong value.
        """
        check_choice("rest", rest, ("prefix", "suffix"))
        given = None if grid is None else (BlockPartition(grid, grid).grid, rest)
        for state in self.states().values():
            state.given = given

    def set_warmup(self, share: float) -> None:
        """Sets how far thresholds are on their way from full attention, from the next forward on; see ``Warmup``.

        Call it before the first forward, because until then taus are constants of compiled graphs. Afterwards there are
        two graphs, for full attention and for sparse, whatever the share. Do not call it inside a CUDA graph.

        Args:
            share: 0 for full attention, up to 1 for the config's thresholds.

        Raises:
            TypeError: if ``share`` is no number.
            ValueError: if it is not in [0, 1], or a layer has a ``TopK``.
        """
        check_warmup(share)
        states = self.states().values()
        for setting in (setting for state in states for setting in rules_of_layers(state.config.rule)):
            for rule in values_of(setting):
                warmed(rule, share)  # checked before any change
        for state in states:
            state.warmup = share

    def set_step(self, step: int | None, num_steps: int = 1) -> None:
        """Sets the denoising step, from 0, and the number of steps for this thread's forwards until the next call.

        ``None`` leaves the step to the pipeline's scheduler again.

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
        """A pipeline's ``callback_on_step_end``, for schedulers without a ``step_index``.

        Fetch it anew for each run, on the thread of the run, which then starts at its first step.
        """
        self._set_step("first")
        return self._end_step

    def forget(self) -> None:
        """Drops what layers remember of this thread's run, as the end of a run does.

        Call it after a run that was broken off, and before a new one whose steps are set by hand.
        """
        for state in self.states().values():
            state.forget()

    def remove(self) -> None:
        """Puts the stock processors back. The model then computes what it did before, bit for bit."""
        for model, applied in self._applied.values():
            applied.remove(model)
        self._applied = {}

    def __repr__(self) -> str:
        models = (f"{name}: {len(applied.names)} layers" for name, (_, applied) in self._applied.items())
        return f"VMoBAHandle({', '.join(models) or 'removed'})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _end_step(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        # None after the last step: the scheduler of the next run may count.
        self._set_step(step_at(pipe, first_call(pipe) + step + 1), schedule_of(pipe))
        return callback_kwargs

    def _set_step(self, step: Step | Literal["first"] | None, schedule: Tensor | None = None) -> None:
        for state in self.states().values():
            state.now.step, state.now.schedule = step, schedule


def models_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models that take VMoBA, by name: a pipeline's transformers, or the model itself.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(pipe_or_model, nn.Module):
        return {"model": unwrap(pipe_or_model)}
    found = {name: getattr(pipe_or_model, name, None) for name in _COMPONENTS}
    for name, model in found.items():
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"pipe_or_model must have a model as {name}, got {type(model).__name__}")
    models = {name: unwrap(model) for name, model in found.items() if model is not None}
    if not models:
        raise TypeError(
            f"pipe_or_model must be a model, or have one as {' or '.join(_COMPONENTS)}, got "
            f"{type(pipe_or_model).__name__}"
        )
    return models
