"""What layers keep of steps that choose by exact masses, as bits, until the run that made them ends; see ``Remember``.

A run's memory belongs to a thread and a model: threads, copies and pickles of a model take none of it. A layer has one
``LayerMemory`` for each pass of a step, such as those with and without the prompt.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.call import Dispatch
from vmoba_flex.inputs import check_query_key, under_autocast
from vmoba_flex.layer import Layer
from vmoba_flex.partition import BlockPartition
from vmoba_flex.remember import Remember
from vmoba_flex.rules import Rule
from vmoba_flex.selection.choose import keep_each
from vmoba_flex.selection.kept import Selection
from vmoba_flex.told import Told

# The name that a pipeline gives a pass, and which pass of that name it is within the step.
Pass = tuple[str | None, int]


class RunMemory:
    """What all layers of a model keep in one run.

    Attributes:
        remember: how.
        schedule: the timesteps of the run; None where steps are set by hand.
        num_steps: of the run.
        step: of the last forward.
        layers: by pass and layer.
        peak: the most bytes at any time.
    """

    def __init__(self, remember: Remember, schedule: Any, num_steps: int, told: Told) -> None:
        self.remember, self.schedule, self.num_steps, self.told = remember, schedule, num_steps, told
        self.step, self.peak = 0, 0
        self.layers: dict[tuple[Pass, int], LayerMemory] = {}
        self._passes: Counter[str | None] = Counter()

    def is_of(self, schedule: Any, step: int, num_steps: int) -> bool:
        """Whether a forward belongs to this run: a run's steps rise."""
        return self.schedule is schedule and self.num_steps == num_steps and self.step <= step

    def begin_pass(self, step: int, name: str | None) -> Pass:
        """The pass of a forward that begins."""
        if step != self.step:
            self.step = step
            self._passes.clear()
        self._passes[name] += 1
        return name, self._passes[name]

    def layer(self, one: Pass, i: int) -> "LayerMemory":
        """What a layer keeps in a pass."""
        return self.layers.setdefault((one, i), LayerMemory(self))

    def clear(self, one: Pass | None = None) -> None:
        """Drops what a pass kept, or all. The objects stay, empty, because plans may hold them."""
        for (of, _), memory in self.layers.items():
            if one in (None, of):
                memory.clear()

    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(kept.selection.nbytes for memory in self.layers.values() for kept in memory.kept.values())


@dataclasses.dataclass(frozen=True)
class _Kept:
    selection: Selection
    device: torch.device
    dtype: torch.dtype

    def fits(self, query: Tensor, partition: BlockPartition) -> bool:
        own = (*self.selection.bits.shape[:2], self.device, self.dtype)
        return own == (*query.shape[:2], query.device, query.dtype) and self.selection.partition == partition.constant()


class LayerMemory:
    """What one layer keeps in one pass, by the rule that chose it.

    Attributes:
        run: that it is part of.
        kept: choices by rule.
        too_large: the rules whose choice did not fit.
        why: the layer has nothing to attend, if so.
    """

    def __init__(self, run: RunMemory) -> None:
        self.run = run
        self.kept: dict[Rule, _Kept] = {}
        self.too_large: set[Rule] = set()
        self.why = ""
        self.clear()

    def clear(self) -> None:
        """Drops everything."""
        self.kept.clear()
        self.too_large.clear()
        self.why = "nothing is remembered"

    def records_of(self, layer: Layer) -> tuple[Rule, ...]:
        """The rules by which a layer chooses from exact masses now: also one that is missing, if it may choose anew."""
        may_choose = layer.recalls and not layer.records and self.run.remember.refresh is not None
        lost = layer.rule not in self.kept and layer.rule not in self.too_large
        return (layer.rule,) if may_choose and lost else layer.records

    def choice(
        self, rule: Rule, records: tuple[Rule, ...], dense: bool, query: Tensor, key: Tensor, partition: BlockPartition,
        dispatch: Dispatch,
    ) -> Selection | None:  # fmt: skip
        """What a layer attends that is not dense: what it chose just now, or keeps; None if neither fits."""
        chosen = self.record(records, query, key, partition, dispatch) if records else {}
        return None if dense else chosen.get(rule) or self.recall(rule, query, partition)

    @torch.no_grad()
    def record(
        self, rules: tuple[Rule, ...], query: Tensor, key: Tensor, partition: BlockPartition, dispatch: Dispatch
    ) -> dict[Rule, Selection]:
        """Chooses by each rule from exact masses, which are made once, and keeps what fits in place of what was kept.

        Returns:
            All that was chosen, also what did not fit.
        """
        self.clear()
        remember = self.run.remember
        exact = tuple(dataclasses.replace(rule, gate="exact") for rule in rules)
        query, key = under_autocast(query, key)
        for rule in exact:
            partition = check_query_key(query, key, partition, rule)
        kept = keep_each(query, key, partition, exact, "tile" if dispatch == "shared" else "token")
        chosen = dict(zip(rules, kept, strict=True))
        for rule, one in chosen.items():
            if self.run.nbytes() + one.nbytes > remember.max_bytes:
                self.why = f"the choice does not fit into max_bytes={remember.max_bytes}"
                self.run.told.tell(
                    "remember: layers whose choice does not fit choose by their rule's own gate: max_bytes=%d is less "
                    "than all layers and passes take. Raise it, with on='cpu' if the device has no room",
                    remember.max_bytes,
                )  # fmt: skip
                self.too_large.add(rule)
                continue
            self.kept[rule] = _Kept(one.to("cpu") if remember.on == "cpu" else one, query.device, query.dtype)
            self.run.peak = max(self.run.peak, self.run.nbytes())
        return chosen

    def recall(self, rule: Rule, query: Tensor, partition: BlockPartition) -> Selection | None:
        """What is kept for a rule and fits the call; None if nothing does."""
        kept = self.kept.get(rule)
        if kept is not None and not kept.fits(query, partition):
            self.clear()
            self.why = "the call changed in mid-run: nothing is remembered"
            self.run.told.tell(
                "remember: grid, text, batch, heads, dtype or device changed in mid-run: layers choose by their rule's "
                "own gate from step %d on", self.run.step,
            )  # fmt: skip
            return None
        if kept is None:
            self.run.told.tell(
                "remember: nothing is kept for step %d of %d: its layers choose by their rule's own gate. A run that "
                "begins sparse, or in mid-run, has no dense step of its own; Remember(refresh=n) chooses anew there",
                self.run.step, self.run.num_steps,
            )  # fmt: skip
            return None
        return kept.selection.to(query.device)
