"""How much of full attention's mass layers attend, measured at one sparse step of a denoise."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.insight.masses import recall_of, true_mass
from vmoba_flex.insight.measure import sample_rows
from vmoba_flex.insight.records import Record
from vmoba_flex.models.handle import VMoBAHandle, models_of
from vmoba_flex.models.plan import LayerPlan
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.partition import BlockPartition
from vmoba_flex.selection.choose import vmoba_selection
from vmoba_flex.selection.kept import Selection

_HEADS, _ROWS = 4, 64


class RecallProbe:
    """Measures each layer's recall once: at a model's first sparse step from the run's middle on, for some queries.

    Attributes:
        recalls: by model and layer; 1 where a layer is dense.
        seconds: that this took, to be left out of the denoise's.
    """

    def __init__(self, pipe: Any, handle: VMoBAHandle) -> None:
        self.recalls: dict[tuple[str, int], float] = {}
        self.seconds = 0.0
        self._models, self._states = models_of(pipe), handle.states()
        self._done: set[str] = set()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Measures while it lasts. Graphs do not call a recorder, so compiled models have no recall."""
        hooks = []
        for name, model in self._models.items():
            if not any(one._compiled_call_impl is not None for one in model.modules()):
                hooks += [model.register_forward_pre_hook(self._begin(name))]
                hooks += [model.register_forward_hook(self._end(name), always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, name: str) -> Any:
        state = self._states[name]

        def begin(*_: Any) -> None:
            if name not in self._done and _is_time(state):
                self._done.add(name)
                state.recorder = lambda *call: self._take(name, state, *call)

        return begin

    def _end(self, name: str) -> Any:
        state = self._states[name]

        def end(*_: Any) -> None:
            state.recorder = None

        return end

    def _take(
        self, name: str, state: ModelState, processor: VMoBAProcessor, query: Tensor, key: Tensor,
        partition: BlockPartition, lengths: Tensor | None,
    ) -> None:  # fmt: skip
        if processor.ranks is not None:
            return
        start = now()
        layer, plan = state.processors.index(processor), processor.plan()
        recall = 1.0
        if not plan.dense:
            selection = _attended(plan, query, key, partition, lengths, state.config.dispatch)
            recall = _recall(query, key, partition, lengths, selection)
        self.recalls[name, layer] = recall
        self.seconds += now() - start


def now() -> float:
    """Seconds, once the accelerator has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _is_time(state: ModelState) -> bool:
    """Whether the forward that begins is sparse, and no earlier than the run's middle where its step is known."""
    step = state.known_step()
    plans = [state.config.layer(i, len(state.processors), *(step or (0, 1))) for i in range(len(state.processors))]
    return (step is None or 2 * step[0] >= step[1]) and not all(plan.dense for plan in plans)


def _attended(
    plan: LayerPlan, query: Tensor, key: Tensor, partition: BlockPartition, lengths: Tensor | None, dispatch: str
) -> Selection:
    """What a sparse layer attends in the first sample: what it remembers, or else what its rule chooses."""
    kept = None if plan.memory is None else plan.memory.kept.get(plan.rule)
    if kept is not None and plan.rule not in plan.records and kept.fits(query, partition):
        return dataclasses.replace(kept.selection.to(query.device), recall=None, plan=None)
    rule = dataclasses.replace(plan.rule, gate="exact") if plan.rule in plan.records else plan.rule
    choice = "tile" if dispatch == "shared" else "token"
    lengths = None if lengths is None else lengths[:1]
    return vmoba_selection(query[:1], key[:1], partition, rule, choice=choice, text_lengths=lengths, as_bits=True)


def _recall(
    query: Tensor, key: Tensor, partition: BlockPartition, lengths: Tensor | None, selection: Selection
) -> float:
    """The mean over some heads and queries of the first sample."""
    count = query.shape[1]
    heads = torch.linspace(0, count - 1, min(count, _HEADS)).round().long().tolist()
    of_key = [head * key.shape[1] // count for head in heads]
    length = None if lengths is None else int(lengths[0])
    record = Record(query[0, heads], key[0, of_key], partition, text_length=length)
    rows = sample_rows(partition, _ROWS, 0).to(query.device)
    some = dataclasses.replace(selection, bits=selection.bits[:1, heads], recall=None, plan=None)
    return recall_of(true_mass(record, partition, rows), some.selected()[0][:, rows]).mean().item()
