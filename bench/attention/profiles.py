"""Where the time of one call goes: each stage's launches and time next to its floor, with and without a tail.

    python -m bench.attention.profiles --output bench/results/<gpu>_<date>_profiles.json     # on a GPU

55,296 tokens (grid 24x36x64, 72 cubes), 12 heads, head dim 128, bfloat16, random inputs, ``TopK``, cells of about 64
tokens; the choice of blocks is included. A kernel counts for the stage that launched it, and else for its op, so the
kernels that no stage names are seen too. ``busy`` is the time of all kernels, ``wall`` that of a call among others,
``host`` the time until a call on an idle GPU returns to Python. ``--device cpu --small`` tries it out.
"""

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.attention.floors import Sizes, floors
from bench.attention.stages import STAGES, kernel_milliseconds
from bench.common import script
from bench.common.machine import error_text
from bench.common.report import number, table
from bench.common.timing import milliseconds
from vmoba_flex import BlockPartition, Tail, TopK, vmoba_attention
from vmoba_flex.call import Backend, Dispatch
from vmoba_flex.tail import Cells

DENSITIES = (0.0625, 0.125)
WAYS: tuple[tuple[Dispatch, Backend], ...] = (("packed", "flash"), ("shared", "flash"), ("packed", "triton"))

_TILES, _TAIL = ("slot_steps", "flash_kernels"), ("coarse_steps", "coarse_kernels")
CALL_STAGES = {
    **STAGES,
    "gate": [*STAGES["gate"], "vmoba_flex.selection.tiles.tile_scores"],
    "select": [*STAGES["select"], "vmoba_flex.selection.tiles.select"],
    "plan": [*STAGES["plan"], "vmoba_flex.dispatch.shared.block_slots"],
    "lists": [f"block_masks.attention.slot_attention.{name}" for name in ("_key_tiles", "tile_lists")],
    "slots": ["block_masks.plans.moves._gather_slots"],
    "slots, cells": [f"vmoba_flex.dispatch.{module}.slots_and_cells" for module in ("packed", "shared")],
    "slots, cells, gradients": ["vmoba_flex.cell_slots._backward_op"],
    "attention": [*STAGES["attention"], *(f"block_masks.attention.{module}.attend_tiles" for module in _TILES)],
    "attention backward": [
        *STAGES["attention backward"],
        *(f"block_masks.attention.{module}.attend_tiles_backward" for module in _TILES),
    ],
    "delta": [*STAGES["delta"], *(f"block_masks.attention.{module}.delta" for module in _TILES)],
    "tail: words": ["block_masks.attention.coarse_kernels.pack_words"],
    "tail: merge": [f"block_masks.attention.{module}.merge_coarse" for module in _TAIL],
    "tail: gradients": [f"block_masks.attention.{module}.coarse_backward" for module in _TAIL],
}
"""The functions of each stage of ``packed`` and of ``shared`` on FlashAttention-4, tail included."""


def measure(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for each dispatch, backend, density, tail or none, and direction."""
    grid, cube, heads, dim = ((4, 8, 8), (2, 4, 4), 2, 16) if small else ((24, 36, 64), (8, 12, 8), 12, 128)
    partition = BlockPartition.spatiotemporal(grid, cube)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, heads, partition.num_tokens, dim)
    query, key, value, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    cells = Cells(partition, Tail().cell_of(partition)).total
    rows = []
    for (dispatch, backend), density, tail in itertools.product(WAYS, DENSITIES, (Tail(), None)):
        rule = TopK(density=density)
        options: dict[str, Any] = {"dispatch": dispatch, "backend": backend if device == "cuda" else "auto"}
        sizes = Sizes(
            heads, partition.num_tokens, partition.num_blocks, cells if tail else 0, dim, dtype.itemsize,
            rule.blocks_per_query(partition.num_blocks) / partition.num_blocks, 128 if dispatch == "shared" else 1,
        )  # fmt: skip

        def forward(options: dict[str, Any] = options, rule: TopK = rule, tail: Tail | None = tail) -> torch.Tensor:
            return vmoba_attention(query, key, value, partition, rule, tail=tail, **options)

        row: dict[str, Any] = {"dispatch": dispatch, "backend": backend, "density": density, "tail": repr(tail)}
        try:
            output = forward()
            calls = {
                "forward": torch.no_grad()(forward),
                "backward": lambda output=output: torch.autograd.grad(output, leaves, grad, retain_graph=True),
            }
            for name, call in calls.items():
                rows.append(row | {"call": name} | _profile(call, device, floors(sizes, name == "backward")))
                print(*row.values(), name, *(rows[-1][x] for x in ("launches", "busy_ms", "wall_ms")), flush=True)
        except ValueError as error:  # a backend that cannot run here
            rows.append(row | {"call": "forward", "error": error_text(error)})
    return rows


def _profile(call: Callable[[], Any], device: str, least: dict[str, Any]) -> dict[str, Any]:
    call()
    wall = milliseconds(call, device)
    found = kernel_milliseconds(call, device, most=20, stages=CALL_STAGES)
    stages = {
        stage: {"ms": ms, "launches": found["by_stage_launches"].get(stage, 0)}
        for stage, ms in found["by_stage_ms"].items()
    }
    for stage, floor in least.items():
        of_stage = stages.setdefault(stage, {"ms": None, "launches": 0})
        of_stage |= {"gb": floor.bytes / 1e9, "tflop": floor.flop / 1e12, "floor_ms": floor.ms}
    return {
        "wall_ms": wall,
        "busy_ms": sum(found["by_stage_ms"].values()),
        "host_ms": _host_milliseconds(call, device),
        "launches": sum(found["by_stage_launches"].values()),
        "floor_ms": sum(floor.ms for floor in least.values()),
        "stages": stages,
        "kernels": found["kernels"],
    }


def _host_milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median time until a call returns, each on an idle device."""
    times = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The run's facts, a table of all calls, and for each call with a tail a table of its stages."""
    parts = script.head(facts)
    rows = [row for row in rows if "error" not in row]
    names = ("call", "tail", "floor", "busy", "wall", "host", "launches")
    whole = [
        [_title(row), "no" if row["tail"] == "None" else "yes"]
        + [number(row[name], 2) for name in ("floor_ms", "busy_ms", "wall_ms", "host_ms")]
        + [str(row["launches"])]
        for row in rows
    ]
    parts += table(names, whole)
    plain = {_title(row): row["stages"] for row in rows if row["tail"] == "None"}
    for row in rows:
        if row["tail"] == "None":
            continue
        names = ("stage", "launches", "ms", "floor", "GB", "TFLOP", "without a tail: launches", "ms")
        parts += ["", f"## {_title(row)}", "", *table(names, _lines(row["stages"], plain.get(_title(row), {})))]
    return "\n".join(parts) + "\n"


def _title(row: dict[str, Any]) -> str:
    return f"{row['dispatch']}, {row['backend']}, {row['density']}, {row['call']}"


def _lines(stages: dict[str, Any], plain: dict[str, Any]) -> list[list[str]]:
    lines = []
    for stage in [*stages, *(stage for stage in plain if stage not in stages)]:
        tailed, without = stages.get(stage, {}), plain.get(stage, {})
        lines.append(
            [stage, str(tailed.get("launches", ""))]
            + [number(tailed.get(name), 3) for name in ("ms", "floor_ms", "gb", "tflop")]
            + [str(without.get("launches", "")), number(without.get("ms"), 3)]
        )
    return lines


def main() -> None:
    """Measures and writes the JSON file, and the tables next to it."""
    script.run("bench.attention.profiles", __doc__, measure, markdown)


if __name__ == "__main__":
    main()
