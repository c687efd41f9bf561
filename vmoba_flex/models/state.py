"""What belongs to a model, and what belongs to one forward of it.

To the model (``ModelState``): the config, whether it is enabled, and how far thresholds are warmed up. To a forward
(``Forward``, in ``plan.py``): grid, step, and for each layer a ``LayerPlan``. The hook before the model's forward makes
the plans and puts each into its processor's ``now``, a thread-local; the hook after it takes them out. So:

- Threads do not see each other's forwards, and a layer that runs without a forward of its model finds nothing.
- The hooks stay outside of compiled graphs. Graphs read ``now``: grid and block are guarded, and with gradients also
  rule, tail and whether the layer is dense. What changes from step to step is a tensor: a warmed tau, and without
  gradients the plan's number (``handle``), by which an op finds the plan when it runs.
- Layers that are computed again in backward run in the plans of their own forward, which ``Checkpointing`` binds to
  what a checkpoint recomputes. A checkpoint that it does not know may recompute while all forwards whose graphs are
  alive have the same plans; otherwise it is an error.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.dense_schedule import is_dense_layer
from vmoba_flex.models.memory import Pass, RunMemory
from vmoba_flex.models.plan import Forward, Grid, LayerPlan, Rest, ThreadLocal
from vmoba_flex.models.steps import Step, StepSource, counted_step, first_call, running_pipeline, schedule_of, step_at
from vmoba_flex.told import Told
from vmoba_flex.warmup import warmed


class ModelNow(ThreadLocal):
    """This thread's part of a model's state.

    Attributes:
        forward: that is under way.
        step: that was set by hand or by a callback; ``"first"`` stands for the first step of the pipeline that runs,
            where its scheduler does not count.
        schedule: the timesteps of the run whose callback set the step: each run of a scheduler makes its own.
        settings: of the compiler, which hold until the forward's end.
        context: the name that the pipeline gives the pass, by ``cache_context``.
        memory: what layers keep in the run.
    """

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.step: Step | Literal["first"] | None = None
        self.schedule: Tensor | None = None
        self.settings: AbstractContextManager[Any] | None = None
        self.context: str | None = None
        self.memory: RunMemory | None = None


@dataclasses.dataclass(eq=False)
class ModelState:
    """What belongs to a model with VMoBA applied.

    Attributes:
        config: what was applied.
        source: the pipeline that it was applied to, if it was one.
        given: the grid that was set by hand, and where other tokens lie; None where each forward brings its own.
        enabled: whether layers may be sparse at all.
        warmup: share of the way from full attention to the config's thresholds; None until one is set.
        processors: of the layers, in order.
        owner: what readies them before each forward.
        recorder: called with each layer's query and key, while these are captured.
        now: the forward under way.
        alive: forwards whose graphs may still need a recomputation.
        told: what has been logged.
        shapes: each grid with each block shape and numbers of text tokens so far, as many as each layer has graphs.
    """

    config: VMoBAConfig
    source: StepSource | None = None
    given: tuple[Grid, Rest] | None = None
    enabled: bool = True
    warmup: float | None = None
    processors: list[Any] = dataclasses.field(default_factory=list)
    owner: Any = None
    recorder: Callable[..., None] | None = None
    now: ModelNow = dataclasses.field(default_factory=ModelNow)
    alive: "weakref.WeakSet[Forward]" = dataclasses.field(default_factory=weakref.WeakSet)
    told: Told = dataclasses.field(default_factory=Told)
    shapes: set[tuple[Grid, Grid, tuple[int, ...]]] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        if self.source is not None:
            self.source.states.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "alive"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, alive=weakref.WeakSet())

    def plan(self, grid: Grid, skips_scores: Iterable[bool], prefix: int, rest: Rest) -> Forward:
        """Plans a forward.

        Args:
            grid: latent video size after patching.
            skips_scores: of each layer; see ``LayerPlan``.
            prefix: of all layers; see ``LayerPlan``.
            rest: of all layers; see ``LayerPlan``.

        Raises:
            ValueError: if a block exceeds the grid, or the config needs the step and nobody says it.
        """
        step = self.known_step()
        if self.config.needs_step and self.enabled and step is None:
            what = "dense_steps" if self.config.dense_steps else "remember" if self.config.remember else "BySteps"
            raise ValueError(
                f"config with {what} needs the denoising step: run a pipeline whose scheduler has a step_index, pass "
                "callback_on_step_end=handle.on_step_end, or call handle.set_step on the thread of the forward; got no "
                "step"
            )
        all_dense = not self.enabled or self.warmup == 0
        blocks = {kind: self._block(kind, grid) for kind in dict.fromkeys(self.config.cycle)}
        plans, count = [], len(self.processors)
        kept_in = None if all_dense or step is None else self._pass(*step)
        for i, (processor, skips) in enumerate(zip(self.processors, skips_scores, strict=True)):
            layer = self.config.layer(i, count, *(step or (0, 1)))  # layers are all dense where the step is not known
            memory = None
            if kept_in is not None and (layer.records or layer.recalls):
                run, one = kept_in
                memory = run.layer(one, i)
            dense = all_dense or layer.dense
            plan = LayerPlan(
                grid=grid,
                block=blocks[layer.kind],
                rule=layer.rule if self.warmup is None else warmed(layer.rule, self.warmup),
                tail=layer.tail,
                dense=dense,
                skips_scores=skips,
                prefix=prefix,
                rest=rest,
                memory=memory,
                records=() if memory is None else memory.records_of(layer),
                recalls=layer.recalls,
                why=self._why_dense(i) if dense else "",
                dispatch=self.config.dispatch,
                backend=self.config.backend,
                dense_backend=processor.dense_backend,
                ranks=processor.ranks,
            )
            plans.append(plan)
        return Forward(tuple(plans), step, kept_in)

    def enter(self, forward: Forward | None) -> Forward | None:
        """Puts a forward under way on this thread, or none; returns the one before."""
        before, self.now.forward = self.now.forward, forward
        for i, processor in enumerate(self.processors):
            processor.now.plan = None if forward is None else forward.plans[i]
        return before

    def run_in(self, forward: Forward, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of a layer in the plans of a forward."""
        before = self.enter(forward)
        try:
            return layer(*args, **kwargs)
        finally:
            self.enter(before)

    def recomputed_plan(self, processor: Any) -> LayerPlan:
        """The plan of a layer that runs while no forward of its model is under way.

        Raises:
            RuntimeError: if there is none, or more than one that it may be.
        """
        i = next(i for i, one in enumerate(self.processors) if one is processor)
        plans = [forward.plans[i] for forward in self.alive]
        if not plans:
            raise RuntimeError("a layer with VMoBA applied must run inside a forward of its model, got one by itself")
        if len({plan.facts() for plan in plans}) > 1:
            raise RuntimeError(
                "a layer is computed again, and forwards of different grids, steps or thresholds wait for backward: "
                "checkpoint with model.enable_gradient_checkpointing() or torch's checkpoint_wrapper, which VMoBA "
                "knows, or run backward after each forward"
            )
        return plans[0]

    def known_step(self) -> Step | None:
        """The step that comes next and the number of steps; None where nobody says."""
        if isinstance(self.now.step, tuple) and self.now.schedule is None:
            return self.now.step
        pipe = self._pipe()
        if isinstance(self.now.step, tuple) and self.now.schedule is schedule_of(pipe):
            return self.now.step
        step = counted_step(pipe)
        return step_at(pipe, first_call(pipe)) if step is None and self.now.step == "first" else step

    def _pipe(self) -> Any:
        """The pipeline that runs, or the one that VMoBA was applied to."""
        pipe = running_pipeline()
        return self.source.pipe if pipe is None and self.source is not None else pipe

    def _pass(self, step: int, num_steps: int) -> tuple[RunMemory, Pass] | None:
        """The pass that begins, and what its run keeps; None if nothing is remembered."""
        remember, now = self.config.remember, self.now
        if remember is None:
            return None
        if torch.is_grad_enabled() or self.warmup is not None:
            self.told.tell("remember has no effect with gradients or a warm-up: layers choose by their rule's own gate")
            return None
        schedule = None if isinstance(now.step, tuple) and now.schedule is None else schedule_of(self._pipe())
        if now.memory is None or not now.memory.is_of(schedule, step, num_steps):
            self.forget()
            now.memory = RunMemory(remember, schedule, num_steps, self.told)
        return now.memory, now.memory.begin_pass(step, now.context)

    def end_pass(self, forward: Forward) -> None:
        """Drops what the pass kept if the run ends, and what other models of the pipeline kept, which ran before."""
        if forward.kept_in is None:
            return
        run, one = forward.kept_in
        if run.step == run.num_steps - 1:
            run.clear(one)
            for other in () if self.source is None else self.source.states:
                if other is not self:
                    other.forget()

    def forget(self) -> None:
        """Drops what layers keep in this thread's run."""
        if self.now.memory is not None:
            self.now.memory.clear()
            self.now.memory = None

    def _why_dense(self, i: int) -> str:
        """Which setting makes layer i dense."""
        if not self.enabled or self.warmup == 0:
            return "set_warmup(0)" if self.enabled else "set_enabled(False)"
        layers: Any = self.config.dense_layers  # narrowed by the config
        return "dense_layers" if is_dense_layer(layers, i, len(self.processors)) else "dense_steps"

    def _block(self, kind: str, grid: Grid) -> Grid:
        try:
            return self.config.partition(kind, grid).block
        except ValueError:
            if self.enabled:
                raise
            return grid  # all layers are dense
