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
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.attention import tail
from bench.attention.tail_problem import Problem, check, variant
from bench.common import script
from bench.common.machine import error_text, run_facts
from bench.common.report import table, write_whole
from bench.common.timing import milliseconds

FLOP = {"merge": 4, "query": 6, "key": 8}  # products of each pair of query and coarse key, times 2 and the head dim
VARIANTS: dict[str, list[tuple[int, ...]]] = {
    "merge": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2)],
    "query": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
    "key": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3)],
    "words": [(512, 1), (1024, 1), (256, 1)],
    "cells": [(16, 1), (32, 2), (64, 4), (32, 4), (64, 2)],
}
"""Of the tiles of attention: queries, coarse keys, warps, stages. Of words: rows. Of cells: tokens, warps."""


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
    return (
        "\n".join([*script.head(facts), *table(("kernel", "shape", "check", "stage", "kernel", "TFLOP/s"), lines)])
        + "\n"
    )


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
