"""The time of each stage of one call of ours.

A stage is a list of functions of the packages, named by module. While a call is watched, each function is replaced by
itself between two CUDA events, or inside a profiler range. A stage's time is the sum over its calls in one call of
``vmoba_attention``: over sections of heads, and in forward + backward also what backward does again. It includes the
gaps between a stage's kernels. A kernel counts for the stage or the registered op that launched it, and else for
autograd's op.
"""

import contextlib
import importlib
import importlib.util
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MOVE = [f"block_masks.attention.{module}" for module in ("row_steps", "row_kernels")]
_ATTEND = [f"block_masks.attention.{module}" for module in ("row_steps", "attend_kernels", "flash_kernels")]
STAGES = {
    "gate": ["vmoba_flex.selection.select.gate_scores"],
    "select": ["vmoba_flex.selection.select.select"],
    "plan": ["block_masks.attention.row_attention.plan_rows", "vmoba_flex.dispatch.packed.block_slots"],
    "gather": [*(f"{module}.take_slots" for module in _MOVE), "block_masks.plans.move_kernels.take_rows"],
    "attention": [f"{module}.forward" for module in _ATTEND],
    "merge": [f"{module}.merge_rows" for module in _MOVE],
    "delta": [f"{module}.delta" for module in _MOVE],
    "attention backward": [f"{module}.backward" for module in _ATTEND],
    "sum rows": [f"{module}.sum_rows" for module in _MOVE],
}
"""The functions of each stage, in the order of a call, as the module that calls them looks them up."""

_RANGE = "stage: "
_OURS = re.compile(r"^(vmoba_flex|block_masks)::")
_BACKWARD = re.compile(r"^autograd::engine::evaluate_function: ")


@contextlib.contextmanager
def watched(
    around: Callable[[str, Callable[..., Any]], Callable[..., Any]], stages: dict[str, list[str]] | None = None
) -> Iterator[None]:
    """Replaces each stage's functions by ``around(stage, function)``; ``STAGES`` if no stages are given.

    Raises:
        AttributeError: if a module of the stages lacks a function.
        ImportError: if there is no such module.
    """
    with contextlib.ExitStack() as stack:
        for stage, places in (stages or STAGES).items():
            for place in filter(_is_loadable, places):
                module_name, _, name = place.rpartition(".")
                module = importlib.import_module(module_name)
                stack.enter_context(mock.patch.object(module, name, around(stage, getattr(module, name))))
        yield


def _is_loadable(place: str) -> bool:
    """Whether a function can be imported here: modules named ``*_kernels`` need Triton."""
    return not place.rpartition(".")[0].endswith("_kernels") or importlib.util.find_spec("triton") is not None


def stage_milliseconds(call: Callable[[], Any], device: str, repeats: int) -> dict[str, float]:
    """Median time of each stage, and of the whole call, in one call that has been made before.

    Where one stage calls another, the inner one's time counts for the inner one only.
    """
    runs = [_one_run(call, device) for _ in range(repeats)]
    return {stage: median(run[stage] for run in runs) for stage in (*STAGES, "whole call") if stage in runs[0]}


def _one_run(call: Callable[[], Any], device: str) -> dict[str, float]:
    marks: list[tuple[str, str, Any, Any]] = []
    outer = [""]  # the stages that are running

    def around(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer.append(stage)
            start = _now(device)
            try:
                return function(*args, **kwargs)
            finally:
                outer.pop()
                marks.append((stage, outer[-1], start, _now(device)))

        return timed

    with watched(around):
        start = _now(device)
        call()
        marks.append(("whole call", "", start, _now(device)))
    _synchronize(device)
    totals: dict[str, float] = defaultdict(float)
    for stage, caller, first, last in marks:
        elapsed = first.elapsed_time(last) if device == "cuda" else 1e3 * (last - first)
        totals[stage] += elapsed
        if caller:
            totals[caller] -= elapsed
    return totals


def kernel_milliseconds(
    call: Callable[[], Any], device: str, most: int = 12, stages: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """Device time and launches of one call by stage or op, and the kernels that take most.

    On a CPU, ops and their CPU time. ``stages``: ``STAGES`` if None.
    """

    def around(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(_RANGE + stage):
                return function(*args, **kwargs)

        return named

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with watched(around, stages), profile(activities=activities) as profiler:
        call()
        _synchronize(device)
    by_stage: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    by_kernel: dict[str, list[float]] = defaultdict(list)
    events: Any = profiler.events()
    of_cpu = [event for event in events if event.device_type.name == "CPU"]
    # Ranges show up on the device too, next to the kernels in them.
    ranges = {event.name for event in of_cpu}
    linked = 0.0
    for event in of_cpu:
        kernels = [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name not in ranges]
        if device == "cpu" and not event.name.startswith(_RANGE):
            kernels = [(event.name, event.self_cpu_time_total)]
        for name, duration in kernels:
            linked += duration
            by_stage[_stage_of(event)] += duration / 1e3
            launches[_stage_of(event)] += 1
            by_kernel[name].append(duration / 1e3)
    if device == "cuda":
        on_device = [e for e in events if e.device_type.name == "CUDA" and e.name not in ranges]
        total = sum(event.time_range.elapsed_us() for event in on_device)
        if total > linked:
            by_stage["launched outside of any op"] = (total - linked) / 1e3
            launches["launched outside of any op"] = len(on_device) - sum(launches.values())
    slowest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "by_stage_ms": dict(sorted(by_stage.items(), key=lambda item: -item[1])[: 2 * most]),
        "by_stage_launches": dict(launches),
        "kernels": [{"name": name[:100], "ms": sum(times), "calls": len(times)} for name, times in slowest],
    }


def _stage_of(event: Any) -> str:
    """The innermost stage, else the outermost op of ours, else what of autograd launched it, else the op itself."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    names = [str(link.name) for link in reversed(chain)]
    for name in reversed(names):
        if name.startswith(_RANGE):
            return name.removeprefix(_RANGE)
    for pattern in (_OURS, _BACKWARD):
        for name in names:
            if pattern.match(name):
                return "backward: " + _BACKWARD.sub("", name) if pattern is _BACKWARD else name
    return names[-1]


def _now(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
