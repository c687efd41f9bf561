"""The denoising step of the pipeline that runs, counted in its scheduler's whole schedule.

A run that starts late (video to video, ``strength`` below 1) starts at a later step, and has fewer dense steps left.
"""

import sys
import weakref
from typing import Any

from torch import nn

# The step that comes next, from 0, and the number of steps.
Step = tuple[int, int]


class StepSource:
    """The pipeline that VMoBA was applied to; copies and pickles of a model take no copy of it.

    Attributes:
        states: of the pipeline's models.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self.states: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_source, ()

    @property
    def pipe(self) -> Any:
        """The pipeline, or None if it is gone."""
        return self._pipe()


def _no_source() -> None:
    return None


def running_pipeline() -> Any:
    """The pipeline in whose call this thread is, or None.

    Several pipelines may share a transformer, and only the call stack tells which of them runs it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if not isinstance(caller, nn.Module) and hasattr(getattr(caller, "scheduler", None), "timesteps"):
                return caller
        frame = frame.f_back
    return None


def counted_step(pipe: Any) -> Step | None:
    """The step that ``pipe``'s scheduler comes to next; None if it does not count, was not started or is done."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    # Diffusion forcing steps copies of its scheduler, which itself stays where it is.
    if not hasattr(scheduler, "step_index") or "DiffusionForcing" in type(pipe).__name__:
        return None
    if getattr(scheduler, "num_inference_steps", None) is None:
        return None
    index = scheduler.step_index
    if index is None:  # until the first step of a run is done
        index = getattr(scheduler, "begin_index", None)
    return step_at(pipe, first_call(pipe) if index is None else index)


def first_call(pipe: Any) -> int:
    """The entry of the scheduler's timesteps that a run of ``pipe`` starts with."""
    timesteps = len(schedule_of(pipe))
    return max(0, timesteps - getattr(pipe, "num_timesteps", timesteps))


def step_at(pipe: Any, index: int) -> Step | None:
    """The step of an entry of the scheduler's timesteps, of which some schedulers have two a step; None at the end."""
    order = getattr(getattr(pipe, "scheduler", None), "order", 1)
    timesteps = max(len(schedule_of(pipe)), getattr(pipe, "num_timesteps", 0))
    return (int(index) // order, -(-timesteps // order)) if index < timesteps else None


def schedule_of(pipe: Any) -> Any:
    """The timesteps of a pipeline's scheduler, a tensor; empty if it has none."""
    return getattr(getattr(pipe, "scheduler", None), "timesteps", ())
