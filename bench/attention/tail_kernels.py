"""The tail's kernels in several tile shapes: each checked against its eager twin and timed; then whole calls.

    python -m bench.attention.tail_kernels --output bench/results/<gpu>_<date>_tail_kernels.json     # on a GPU

55,296 tokens (grid 24x36x64, 72 cubes), 864 cells of 64 tokens, 12 heads, head dim 128, bfloat16, density 0.125. Each
variant runs in a process of its own first, several at a time, which compiles it and checks it; then one process times
all. ``--calls`` then runs ``bench.attention.tail`` with the fastest of each. ``--device cpu --small`` tries it out.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.attention import tail
from bench.common.machine import error_text, run_facts
from bench.common.report import table, write_whole
from bench.common.timing import milliseconds
from block_masks import CoarseKeys, to_slots
from block_masks.attention import coarse_steps, row_steps
from vmoba_flex import BlockPartition, Tail, TopK, vmoba_selection
from vmoba_flex.cell_slots import _backward_op, slots_and_cells
from vmoba_flex.groups import block_slots

FLOP = {"merge": 4, "query": 6, "key": 8}  # products of each pair of query and coarse key, times 2 and the head dim
VARIANTS: dict[str, list[tuple[int, ...]]] = {
    "merge": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2)],
    "query": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
    "key": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3)],
    "words": [(512, 1), (1024, 1), (256, 1)],
    "cells": [(16, 1), (32, 2), (64, 4), (32, 4), (64, 2)],
}
"""Of the tiles of attention: queries, coarse keys, warps, stages. Of words: rows. Of cells: tokens, warps."""
# The most that results may differ from the eager twin's in float32, relative to these: bfloat16 keeps 8 bits.
TOLERANCE = 0.01


@contextlib.contextmanager
def variant(name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Lets the kernels run in this shape."""
    from block_masks.attention import coarse_kernels
    from vmoba_flex import cell_slot_kernels

    with contextlib.ExitStack() as stack:
        if name == "words":
            stack.enter_context(mock.patch.object(coarse_kernels, "_ROWS", shape[0]))
        elif name == "cells":
            stack.enter_context(mock.patch.object(cell_slot_kernels, "_TOKENS", shape[0]))
            stack.enter_context(mock.patch.object(cell_slot_kernels, "_WARPS", shape[1]))
        else:
            shapes = coarse_kernels._SHAPES["16 bit"] | {name: shape}
            stack.enter_context(mock.patch.dict(coarse_kernels._SHAPES, {"16 bit": shapes}))
        yield


class Problem:
    """Random inputs, choices, and what forward makes of them."""

    def __init__(self, device: str, heads: int, small: bool) -> None:
        grid, cube, dim = ((4, 8, 8), (2, 4, 4), 16) if small else ((24, 36, 64), (8, 12, 8), 128)
        if heads < 12 and not small:
            # Sizes that Triton compiles the same kernels for.
            grid = (16, 24, 32)
        self.device, self.partition = device, BlockPartition.spatiotemporal(grid, cube)
        generator = torch.Generator(device).manual_seed(0)
        dtype, shape = torch.bfloat16 if device == "cuda" else torch.float32, (1, heads, self.partition.num_tokens, dim)
        self.query, self.key, self.value, self.output, self.grad = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(5)
        )
        self.selected = vmoba_selection(self.query, self.key, self.partition, TopK(density=0.125))[0]
        self.slots = block_slots(self.partition, torch.device(device))
        self.scale, self.lse = dim**-0.5, torch.randn(shape[1:3], generator=generator, device=device) + 7
        *_, self.coarse = slots_and_cells(self.key, self.value, self.partition, Tail(), self.slots)
        flat = (self.query, self.output, self.grad)
        self.flat_query, self.flat_output, self.flat_grad = (x.flatten(0, 1) for x in flat)
        self.merged = torch.empty_like(self.flat_output), torch.empty_like(self.lse)
        self.steps().merge_coarse(*self.merge_arguments(), self.merged, self.scale)
        self.delta = row_steps.delta(self.flat_grad, self.merged[0])

    def steps(self, eager: bool = False) -> Any:
        """The kernels, or their eager twins."""
        if eager or self.device == "cpu":
            return coarse_steps
        from block_masks.attention import coarse_kernels

        return coarse_kernels

    def merge_arguments(self) -> tuple[Any, ...]:
        """What ``merge_coarse`` takes, up to where it writes."""
        return self.flat_query, self.coarse, self.selected, self.flat_output, self.lse

    def results(self, eager: bool = False) -> list[Tensor]:
        """Of all kernels; the eager twin's in float32."""
        merged = torch.empty_like(self.flat_output), torch.empty_like(self.lse)
        coarse, inputs = self.coarse, [self.flat_query, self.flat_output, self.flat_grad]
        if eager:
            coarse, inputs = CoarseKeys(*(x.float() for x in coarse[:3]), coarse.group), [x.float() for x in inputs]
            merged = torch.empty_like(inputs[1]), torch.empty_like(self.lse)
        query, output, grad = inputs
        steps, grad_query = self.steps(eager), torch.zeros_like(query)
        steps.merge_coarse(query, coarse, self.selected, output, self.lse, merged, self.scale)
        of_coarse = steps.coarse_backward(
            query, coarse, self.selected, grad, self.merged[1], self.delta, grad_query, self.scale
        )
        return [*merged, grad_query, *of_coarse]

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed; with ``merge``, ``query`` and ``key`` the other kernels that go with it are timed too."""
        query, coarse, selected, output, lse = self.merge_arguments()
        grad_query, steps = torch.zeros_like(query), self.steps()
        arguments = self.flat_grad, self.merged[1], self.delta, grad_query, self.scale
        moved = [torch.randn_like(to_slots(x, self.slots)) for x in (self.key, self.value)]
        means = [x.unflatten(0, self.key.shape[:2]) for x in coarse[:2]]
        index, sizes = (self.slots.slot_key, self.slots.key_slot), (self.partition.flat, [4, 4, 4])
        stages: dict[str, Callable[[], object]] = {
            "words": lambda: steps.pack_words(coarse, selected),
            "merge": lambda: steps.merge_coarse(query, coarse, selected, output, lse, self.merged, self.scale),
            "gradients": lambda: steps.coarse_backward(query, coarse, selected, *arguments),
            "split": lambda: steps.split_grad(self.flat_grad, output, lse, self.merged[1], self.delta),
            "slots of key and value": lambda: [to_slots(x, self.slots) for x in (self.key, self.value)],
            "cells": lambda: slots_and_cells(self.key, self.value, self.partition, Tail(), self.slots),
            "cells, gradients": lambda: _backward_op(*moved, *means, *index, *sizes),
        }
        if self.device == "cpu":
            del stages["words"]
        return stages


def check(name: str, shape: tuple[int, ...], device: str, small: bool) -> float:
    """The largest error of any result of a small problem, relative to the eager twin's in float32.

    Raises:
        ValueError: if it is too large.
    """
    with variant(name, shape) if device == "cuda" else contextlib.nullcontext():
        problem = Problem(device, 3, small)
        results = problem.results()
        pairs = list(zip(results, problem.results(eager=True), strict=True))
        # Values and keys too, through the means that ``Problem`` took.
        means = coarse_means(problem)
        pairs += list(zip(problem.coarse[:2], means, strict=True))
        if device == "cuda":
            problem.stages()["cells, gradients"]()
    errors = [((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs]
    if not max(errors) < TOLERANCE:
        raise ValueError(f"{name} {shape}: relative errors {errors}")
    return max(errors)


def coarse_means(problem: Problem) -> list[Tensor]:
    """The means of cells in plain PyTorch."""
    from vmoba_flex.cells import plain_means
    from vmoba_flex.tail import Cells

    cells = Cells(problem.partition, Tail().cell_of(problem.partition))
    return [plain_means(x, cells).flatten(0, 1) for x in (problem.key, problem.value)]


def warm(device: str, small: bool, together: int = 12) -> dict[str, str]:
    """Checks each variant in a process of its own, which also leaves its kernels compiled; the outcome by variant."""
    waiting = [(name, shape) for name, shapes in VARIANTS.items() for shape in shapes]
    running: dict[str, subprocess.Popen[str]] = {}
    outcomes: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < together:
            name, shape = waiting.pop(0)
            command = [sys.executable, "-m", "bench.attention.tail_kernels", "--check", name, *map(str, shape)]
            command += ["--device", device] + ["--small"] * small
            running[f"{name} {shape}"] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for label, process in list(running.items()):
            if process.poll() is not None:
                outcomes[label] = (process.communicate()[0].strip().splitlines() or [f"exit {process.returncode}"])[-1]
                del running[label]
                print(label, outcomes[label], flush=True)
        time.sleep(0.05)
    return outcomes


def measure(device: str, small: bool, outcomes: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each variant that came out right: ms of its stage, and for gradients of both kernels together."""
    problem, rows = Problem(device, 2 if small else 12, small), []
    pairs = problem.flat_query.shape[0] * problem.flat_query.shape[1] * len(problem.coarse.bias)
    stage_of = {"merge": "merge", "query": "gradients", "key": "gradients", "words": "words", "cells": "cells"}
    for name, shapes in VARIANTS.items():
        for shape in shapes:
            label = f"{name} {shape}"
            row: dict[str, Any] = {"kernel": name, "shape": shape, "check": outcomes[label], "ms": None}
            rows.append(row)
            if not outcomes[label].startswith("error "):
                continue
            with variant(name, shape) if device == "cuda" else contextlib.nullcontext():
                call = problem.stages().get(stage_of[name])
                if call is None:
                    continue
                row["ms"] = milliseconds(call, device)
                row["kernel_ms"] = kernel_ms(call, name, device)
            if name in FLOP and row["kernel_ms"]:
                flop = FLOP[name] * pairs * problem.query.shape[-1]
                row["tflops"] = flop / row["kernel_ms"] / 1e9
            print(label, row["ms"], row.get("kernel_ms"), row.get("tflops"), flush=True)
    rows += [
        {"kernel": name, "shape": None, "check": "", "ms": milliseconds(call, device), "kernel_ms": None}
        for name, call in problem.stages().items()
    ]
    return rows


def kernel_ms(call: Callable[[], object], name: str, device: str) -> float | None:
    """The GPU's time of the kernel that a variant is of, in one call."""
    if device != "cuda":
        return None
    names = {"merge": "merge_kernel", "query": "query_backward", "key": "key_backward", "words": "words_kernel"}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    found = [event for event in events if names.get(name, "slots_and_means") in event.name]
    return median(event.time_range.elapsed_us() for event in found) / 1e3 if found else None


def fastest(rows: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The fastest shape of each kernel."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["shape"] and row["ms"] is not None:
            best[row["kernel"]] = min(best.get(row["kernel"], row), row, key=lambda x: x["kernel_ms"] or x["ms"])
    return {name: row["shape"] for name, row in best.items()}


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The run's facts, and a table of all rows."""
    lines = []
    for row in rows:
        shape = "" if row["shape"] is None else ", ".join(map(str, row["shape"]))
        times = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in ("ms", "kernel_ms", "tflops")]
        lines.append([row["kernel"], shape, row["check"], *times])
    told = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = [f"`{facts['command']}`", "", f"{facts['device']}, {told}, {facts['date']}; milliseconds", ""]
    return "\n".join([*head, *table(("kernel", "shape", "check", "stage", "kernel", "TFLOP/s"), lines)]) + "\n"


def main() -> None:
    """Checks, measures, and writes the JSON file and the table next to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to try it out")
    parser.add_argument("--calls", action="store_true", help="whole calls with the fastest shapes too")
    parser.add_argument("--check", nargs="+", help="only check one variant: its kernel and shape")
    args = parser.parse_args()
    if args.check:
        try:
            error = check(args.check[0], tuple(map(int, args.check[1:])), args.device, args.small)
            print(f"error {error:.1e}")
        except Exception as error:  # the table shows it
            print(error_text(error))
        return
    name = args.output.name
    facts = run_facts(args.device, f"python -m bench.attention.tail_kernels --calls --output bench/results/{name}")
    rows = measure(args.device, args.small, warm(args.device, args.small, 12 if args.device == "cuda" else 2))
    facts["fastest"] = fastest(rows)
    print(facts["fastest"], flush=True)
    write_whole(args.output, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    write_whole(args.output.with_suffix(".md"), markdown(facts, rows))
    if args.calls:
        with contextlib.ExitStack() as stack:
            for kernel, shape in facts["fastest"].items() if args.device == "cuda" else ():
                stack.enter_context(variant(kernel, shape))
            calls = tail.measure(args.device, args.small)
        write_whole(args.output, json.dumps(facts | {"rows": rows, "calls": calls}, indent=1) + "\n")
        text = args.output.with_suffix(".md").read_text() + "\n" + tail.markdown(facts, calls)
        write_whole(args.output.with_suffix(".md"), text)
        print(text)


if __name__ == "__main__":
    main()
