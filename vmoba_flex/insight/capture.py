"""Records query and key of an applied model as it runs."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.insight.records import Record, save
from vmoba_flex.models.handle import VMoBAHandle
from vmoba_flex.models.processor import VMoBAProcessor
from vmoba_flex.models.state import ModelState
from vmoba_flex.partition import BlockPartition


class capture:  # noqa: N801 - read as a verb: with capture(model) as captured
    """Records query and key of chosen layers and steps while it is on; a context manager.

    A record is on the CPU, in the model's dtype, and holds all tokens of some evenly spread heads, because a pool needs
    all queries of a head. Each layer and step is recorded once: the first sample of the first forward. A record that
    would exceed ``max_bytes`` is left out and counted, so the earliest are kept: take fewer heads, layers or steps.

    Dense layers and steps are recorded too, and still attend everything. Compiled models run eagerly while it is on.

    The step is the scheduler's, or what ``handle.set_step`` was given. Without either, it is the number of forwards so
    far.

    Args:
        pipe_or_model: what ``apply_vmoba`` was called with.
        layers: which to record; all by default.
        steps: which to record; all by default.
        heads: the largest number of heads to record of a layer.
        max_bytes: the most that all records together may take.

    Attributes:
        records: what has been recorded so far.
        left_out: the number of records that did not fit.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a value is out of range, or VMoBA is not applied.

    Example:
        >>> with capture(pipe, layers=[0, 10, 20], steps=[5, 25]) as captured:  # doctest: +SKIP
        ...     pipe("a cat that plays the piano")
        >>> captured.save("cat.safetensors")  # doctest: +SKIP
    """

    def __init__(
        self,
        pipe_or_model: Any,
        *,
        layers: Collection[int] | None = None,
        steps: Collection[int] | None = None,
        heads: int = 4,
        max_bytes: int = 2**30,
    ) -> None:
        self._states = VMoBAHandle.of(pipe_or_model).states()
        most = max(len(state.processors) for state in self._states.values())
        for name, numbers, end in (("layers", layers, most), ("steps", steps, None)):
            if numbers is None:
                continue
            if not isinstance(numbers, Collection) or isinstance(numbers, str | bytes):
                raise TypeError(f"{name} must hold ints, got {numbers!r}")
            for number in numbers:
                check_count(name, number, end, "num_layers")
        check_positive("heads", heads)
        check_positive("max_bytes", max_bytes)
        self._layers, self._steps, self._heads, self._max_bytes = layers, steps, heads, max_bytes
        self._forwards: dict[tuple[str, int], int] = {}
        self._stack = contextlib.ExitStack()
        self.records: list[Record] = []
        self.left_out = 0

    def save(self, path: Path | str) -> None:
        """Writes the records to a safetensors file; see ``records.save``."""
        save(self.records, path)

    def __enter__(self) -> Self:
        for name, state in self._states.items():
            if state.recorder is not None:
                raise ValueError(f"{name} must not be captured already, got a capture that is on")
        for name, state in self._states.items():
            state.recorder = _Recorder(self, name, state)
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for state in self._states.values():
            state.recorder = None

    def _take(
        self, name: str, state: ModelState, processor: VMoBAProcessor, query: Tensor, key: Tensor,
        partition: BlockPartition, text_lengths: Tensor | None,
    ) -> None:  # fmt: skip
        layer = next(i for i, one in enumerate(state.processors) if one is processor)
        forward = self._forwards.get((name, layer), 0)
        self._forwards[name, layer] = forward + 1
        under_way = state.now.forward
        known = None if under_way is None else under_way.step
        step = forward if known is None else known[0]
        if any(wanted is not None and it not in wanted for it, wanted in ((layer, self._layers), (step, self._steps))):
            return
        if any((record.model, record.layer, record.step) == (name, layer, step) for record in self.records):
            return  # a second forward of the step, as guidance makes
        count = query.shape[1]
        heads = torch.linspace(0, count - 1, min(count, self._heads)).round().int().tolist()
        group = count // key.shape[1]
        bytes_each = 2 * query[0, 0].nbytes
        if sum(record.num_bytes() for record in self.records) + len(heads) * bytes_each > self._max_bytes:
            self.left_out += 1
            return
        length = None if text_lengths is None else int(text_lengths[0])
        key_heads = [head // group for head in heads]
        facts: dict[str, Any] = {"kind": processor.kind, "layer": layer, "step": step, "heads": tuple(heads)}
        facts["num_layers"] = len(state.processors)
        facts["num_steps"] = None if known is None else known[1]
        of_query, of_key = (x.detach().cpu() for x in (query[0, heads], key[0, key_heads]))
        self.records.append(Record(of_query, of_key, partition, text_length=length, model=name, **facts))


class _Recorder:
    """What a model's layers call; copies and pickles of the model take none of it."""

    def __init__(self, captured: capture, name: str, state: ModelState) -> None:
        self._captured, self._name, self._state = captured, name, state

    def __call__(
        self, processor: VMoBAProcessor, query: Tensor, key: Tensor, partition: BlockPartition, lengths: Tensor | None
    ) -> None:
        """Records a layer's query and key, if they are wanted."""
        self._captured._take(self._name, self._state, processor, query, key, partition, lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None
