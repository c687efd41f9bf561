"""What one forward asks of each layer, and how a compiled graph finds it when it runs."""

import dataclasses
import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vmoba_flex.call import Backend, Chosen, Dispatch
from vmoba_flex.models.memory import LayerMemory, Pass, RunMemory
from vmoba_flex.models.steps import Step
from vmoba_flex.rules import Rule
from vmoba_flex.tail import Tail
from vmoba_flex.warmup import WarmedThreshold

if TYPE_CHECKING:  # loaded where a model is context-parallel
    from vmoba_flex.collectives import Ranks

Grid = tuple[int, int, int]
# Where tokens lie that are not the grid's.
Rest = Literal["none", "prefix", "suffix"]

_numbers = itertools.count()
_plans: "weakref.WeakValueDictionary[int, LayerPlan]" = weakref.WeakValueDictionary()


# Not frozen: Dynamo guards on all fields of a frozen dataclass, but only on those that it reads of another one.
@dataclasses.dataclass(eq=False)
class LayerPlan:
    """What one forward asks of one layer.

    Attributes:
        grid: latent video size after patching.
        block: of the layer's kind on that grid, in tokens.
        rule: which chooses the blocks.
        tail: how skipped blocks take part; None if they do not.
        dense: whether the layer attends everything.
        skips_scores: whether the layer's output is its value, as diffusers' layer skipping can ask for.
        prefix: tokens before the grid's that the adapter counts.
        rest: where tokens lie that are neither.
        memory: what the layer keeps in this pass of the run; None if nothing is remembered.
        records: rules by which it chooses from exact masses, to keep the choice.
        recalls: whether it is to attend what was kept.
        why: it is dense, if so: the setting that says it.
        dispatch: of the config.
        backend: of the config.
        dense_backend: what a dense layer attends with, by diffusers' name; empty for the fastest of torch's.
        ranks: that share the tokens; None for one.
        recalled: whether it attended what was kept, once it has run.
        chosen: what ran, once it has; of a layer in a graph with gradients, ``traced.py`` knows it.
        handle: the plan's number, int64 ``(1,)`` on the CPU.
    """

    grid: Grid
    block: Grid
    rule: Rule
    tail: Tail | None
    dense: bool
    skips_scores: bool
    prefix: int
    rest: Rest
    memory: LayerMemory | None
    records: tuple[Rule, ...]
    recalls: bool
    why: str
    dispatch: Dispatch
    backend: Backend
    dense_backend: str
    ranks: "Ranks | None"
    recalled: bool = dataclasses.field(default=False, init=False)
    chosen: Chosen | None = dataclasses.field(default=None, init=False)
    handle: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        number = next(_numbers)
        # Whatever the default device and the mode, which compiled graphs would guard on.
        with torch.inference_mode(False):
            self.handle = torch.tensor([number], dtype=torch.int64, device="cpu")
        _plans[number] = self

    @staticmethod
    def of_handle(handle: Tensor) -> "LayerPlan":
        """The plan that a graph was given the number of."""
        return _plans[int(handle.item())]

    def facts(self) -> tuple[Any, ...]:
        """All that decides what the layer computes."""
        tau = self.rule.now.item() if isinstance(self.rule, WarmedThreshold) else self.rule
        return self.grid, self.block, tau, self.tail, self.dense, self.skips_scores, self.prefix, self.rest


@dataclasses.dataclass(eq=False)
class Forward:
    """One forward of a model: a plan for each layer, the step if known, and the pass whose choices are kept, if any."""

    plans: tuple[LayerPlan, ...]
    step: Step | None
    kept_in: tuple[RunMemory, Pass] | None = None


class ThreadLocal(threading.local):
    """Copies and pickles of a model take none of it.

    Attributes are made in ``__init__``, which runs in each thread: Dynamo would take a class's default for the value.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class LayerNow(ThreadLocal):
    """The plan of the forward that is under way on this thread."""

    def __init__(self) -> None:
        self.plan: LayerPlan | None = None
