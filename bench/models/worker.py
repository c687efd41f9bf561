"""Measures the rows one after another in one process."""

import dataclasses
import functools
import sys
import time
import warnings
from argparse import Namespace
from typing import Any

import torch
from torch._inductor import config as inductor_config

from bench.common.machine import error_text, free_memory, print_trace, run_facts
from bench.common.report import Row, is_wanted
from bench.models.report import FORWARD, HEADER, ModelReport, line
from bench.models.rows import NONE, Spec, shared_out, specs
from bench.models.setup import COMPILERS, Setup, StockOutput, WrongError
from bench.models.shapes import FULL, SMALL, ModelSizes, Part

PACKAGES = ("diffusers", "transformers", "accelerate", "nvidia-cudnn-cu13")


def work(args: Namespace) -> int:
    """Measures what ``args`` ask for, within their budget; returns the exit status."""
    started = time.monotonic()
    sizes, device = _prepare(args)
    report = ModelReport.load(args.output) if args.add else ModelReport(args.output)
    bench = Bench(sizes, device)
    facts = run_facts(device, args.command, PACKAGES)
    run = report.start_run(facts)
    print(HEADER, flush=True)
    wanted = _wanted(args, report, sizes)
    rows = ((_describe(spec, sizes, device, run), functools.partial(bench.measure, spec)) for spec in wanted)
    return report.fill(rows, started + args.budget_s, line)


def compile_ahead(args: Namespace) -> int:
    """Compiles the blocks of every n-th group of rows, for the caches on disk; returns the exit status."""
    started = time.monotonic()
    sizes, device = _prepare(args)
    report = ModelReport.load(args.output) if args.add else ModelReport(args.output)
    wanted = _wanted(args, report, sizes)
    groups = {spec.compiled_as: spec for spec in reversed(wanted)}  # the most urgent of each group
    urgent = [spec for spec in wanted if groups[spec.compiled_as] is spec]
    first, step = args.ahead
    for spec in urgent[first::step]:
        for part in spec.model.parts:
            if time.monotonic() - started > args.compile_ahead_s:
                return 0
            few = dataclasses.replace(part, arguments={name: min(3, n) for name, n in part.arguments.items()})
            try:
                with Setup(spec, few, sizes, device) as setup:
                    setup.warm_up(spec.mode)
            except Exception as error:
                print(f"compiling ahead, {spec.id}: {error_text(error)}", file=sys.stderr)
            free_memory(device)
            torch.compiler.reset()
    return 0


def _wanted(args: Namespace, report: ModelReport, sizes: ModelSizes) -> list[Spec]:
    """This GPU's share of the rows asked for, without those that are done."""
    wanted = (spec for spec in specs(sizes, args.device) if is_wanted(spec.id, args.only))
    return [spec for spec in shared_out(wanted, *args.share) if not report.has(spec.id)]


def _prepare(args: Namespace) -> tuple[ModelSizes, str]:
    import diffusers

    # On a GPU this pass leaves slices of a modulation's gradient unwritten (torch 2.10 on, pytorch#193061).
    inductor_config.triton.mix_order_reduction = False
    # Each shape, kind of blocks and grad mode is a graph; with fullgraph, more than the limit is an error.
    torch.compiler.config.recompile_limit = 128  # pyright: ignore[reportAttributeAccessIssue]
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    diffusers.utils.logging.set_verbosity_error()
    if args.device == "cpu":
        torch.set_num_threads(1)  # small tensors, and not the only process
    return SMALL if args.small else FULL, args.device


class Bench:
    """What rows share: the last row's setup, and the outputs to compare with."""

    def __init__(self, sizes: ModelSizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.setup: tuple[Any, Setup] | None = None
        self.stock: dict[Any, StockOutput] = {}

    def measure(self, spec: Spec, row: Row) -> bool:
        """Fills the row, with the error's text if it fails; returns whether the device still works."""
        began = time.monotonic()
        try:
            self._measure(spec, row)
            row["status"] = "ok"
        except torch.OutOfMemoryError as error:
            row["status"], row["error"] = "out of memory", error_text(error)
        except WrongError as error:
            row["status"], row["error"] = "wrong", str(error)
        except ImportError as error:
            row["status"], row["error"] = "not installed", error_text(error)
        except Exception as error:
            row["status"], row["error"] = "failed", error_text(error)
            print_trace()
        row["wall_s"] = time.monotonic() - began
        if row["status"] == "ok":
            return True
        self._close()
        return free_memory(self.device)

    def _measure(self, spec: Spec, row: Row) -> None:
        total = 0.0
        parts = list(enumerate(spec.model.parts))
        if self.setup is not None and self.setup[0] == (*spec.compiled_as, parts[-1][0]):
            parts.reverse()  # the last part's blocks are still compiled
        for index, part in parts:
            began = time.monotonic()
            setup = self._setup_of(spec, index, part)
            setup.warm_up(spec.mode)
            warm_up_s = time.monotonic() - began
            measured = setup.facts | setup.time() | {"warm_up_s": warm_up_s}
            row["parts"][index] |= measured
            total += measured["ms"] * part.of / part.layers
        parts = row["parts"]
        row["ms"] = total
        row["warm_up_s"] = sum(part["warm_up_s"] for part in parts)
        for name in (
            "peak_gb",
            "extra_gb",
            "dense_error",
            "dense_budget",
            "difference",
            "compiled_error",
            "gradient_error",
        ):
            if name in parts[0]:
                row[name] = max(part[name] for part in parts)
        if "density" in parts[0]:
            row["density"] = sum(part["density"] * part["of"] for part in parts) / sum(part["of"] for part in parts)

    def _setup_of(self, spec: Spec, index: int, part: Part) -> Setup:
        key = *spec.compiled_as, index
        if self.setup is None or self.setup[0] != key:
            self._close()
            grid = spec.model.name, spec.grid
            shape = *grid, index
            if spec.attention != NONE and shape not in self.stock:
                self.stock = {other: kept for other, kept in self.stock.items() if other[:-1] == grid}
                self.stock[shape] = StockOutput(spec, part, self.sizes, self.device)
                free_memory(self.device)
            stock = None if spec.attention == NONE else self.stock[shape]
            self.setup = key, Setup(spec, part, self.sizes, self.device, stock)
            free_memory(self.device)
        return self.setup[1]

    def _close(self) -> None:
        if self.setup is not None:
            self.setup[1].close()
            self.setup = None
            torch.compiler.reset()
            free_memory(self.device)


def _describe(spec: Spec, sizes: ModelSizes, device: str, run: int) -> Row:
    model, training = spec.model, spec.mode != FORWARD
    row: Row = {
        "id": spec.id,
        "status": "running",
        "model": model.name,
        "tokens": spec.tokens,
        "grid": spec.grid,
        "mode": spec.mode,
        "attention": spec.attention.name,
        "dense": spec.attention.is_dense,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "text_tokens": model.text_tokens,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "compiler": COMPILERS[device],
        "parts": [{"layers": part.layers, "of": part.of} for part in model.parts],
        "run": run,
    }
    if spec.attention.dispatch:
        asked = spec.attention
        config = sizes.config(spec.grid, training, asked.dispatch, asked.density, asked.tail)
        blocks = {kind: config.partition(kind, spec.grid) for kind in config.cycle}
        row |= {
            "dispatch": config.dispatch,
            "rule": repr(config.rule),
            "tail": repr(config.tail) if config.tail else "",
            "blocks": {kind: {"shape": blocks[kind].block, "count": blocks[kind].num_blocks} for kind in config.cycle},
        }
    return row
