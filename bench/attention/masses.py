"""What the gates and exact block masses cost, next to a dense forward, and which launches of their kernels are fastest.

    python -m bench.attention.masses --output bench/results/<gpu>_<date>_masses.json     # on a GPU

55,296 tokens (grid 24x36x64, 72 cubes, 864 cells), 12 heads, head dim 128, bfloat16, random inputs. Every launch is
checked against the same steps in plain PyTorch, on a sample of queries. ``--device cpu --small`` tries it out.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.common import script
from bench.common.machine import error_text
from bench.common.report import number, table
from bench.common.timing import milliseconds
from block_masks import to_slots
from vmoba_flex import BlockPartition, Threshold, TopK, block_masses, vmoba_selection
from vmoba_flex.groups import block_slots
from vmoba_flex.rules import GATES
from vmoba_flex.selection import exact_gate
from vmoba_flex.selection.cell_gate import cell_scores, cell_stats
from vmoba_flex.selection.cell_places import CellStats, gate_cells
from vmoba_flex.selection.scores import gate_scores
from vmoba_flex.selection.tiles import choose_tiles

# Queries and keys of a tile, warps, stages, and whether keys are read through a descriptor.
EXACT = (
    (128, 128, 8, 3, True),
    (128, 128, 8, 2, True),
    (128, 128, 4, 2, True),
    (64, 128, 4, 2, True),
    (64, 128, 4, 3, True),
    (128, 64, 4, 3, True),
    (128, 64, 8, 3, True),
    (128, 64, 4, 3, False),
)
# Queries of a program, cells at once, warps, and stages.
CELLS = (
    (128, 64, 8, 2),
    (128, 64, 8, 1),
    (128, 128, 8, 1),
    (128, 128, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 1),
    (64, 128, 4, 2),
)
SAMPLE = 96  # queries that are checked
Row = dict[str, Any]


def measure(device: str, small: bool) -> list[Row]:
    """A row for each call and each launch."""
    grid, cube, heads, dim = ((4, 8, 8), (2, 4, 4), 2, 16) if small else ((24, 36, 64), (8, 12, 8), 12, 128)
    partition = BlockPartition.spatiotemporal(grid, cube)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, heads, partition.num_tokens, dim)
    query, key, value = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    rows = []
    for name, run, check in _calls(query, key, value, partition, device):
        row: Row = {"call": name}
        try:
            row["error"] = None if check is None else check()
            row["ms"] = milliseconds(run, device)
        except Exception as error:  # a launch that this GPU has no room for
            row |= {"ms": None, "failed": error_text(error)}
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


Call = tuple[str, Callable[[], Any], Callable[[], float] | None]


def _calls(query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, device: str) -> Iterator[Call]:
    """Name, what is timed, and what tells the largest error of its scores."""
    yield "dense forward", functools.partial(_dense, query, key, value), None
    for gate in GATES:
        with_gate = TopK(density=0.125, gate=gate)
        check = functools.partial(_gate_error, query, key, partition, gate)
        yield f"{gate}: scores", functools.partial(gate_scores, query, key, partition, gate), check
        yield f"{gate}: selection", functools.partial(vmoba_selection, query, key, partition, with_gate), None
        slots = block_slots(partition, query.device)
        tiles = functools.partial(choose_tiles, to_slots(query, slots), key, partition, with_gate, slots)
        yield f"{gate}: choice of tiles", tiles, None
    by_mass = Threshold(0.9, normalize="softmax", pool="query", gate="exact")
    yield (
        "exact: selection of 0.9 of the mass",
        functools.partial(vmoba_selection, query, key, partition, by_mass),
        None,
    )
    yield "block_masses", functools.partial(block_masses, query, key, partition), None
    check = functools.partial(_stats_error, key, partition)
    yield "cells: means and variances", functools.partial(cell_stats, key, gate_cells(partition)), check
    if device == "cuda":
        yield from _launches(query, key, partition)


def _launches(query: Tensor, key: Tensor, partition: BlockPartition) -> Iterator[Call]:
    from vmoba_flex.selection import cell_gate_kernels, exact_kernels

    count, blocks, scale = partition.num_video_tokens, partition.num_blocks, query.shape[-1] ** -0.5
    # Blocks of 455 tokens, in tiles that are cut short.
    short = BlockPartition.spatiotemporal((21, 30, 52), (7, 5, 13))
    cut = [x[:, :, : short.num_tokens] for x in (query, key)]
    for each in EXACT:
        launch = exact_kernels.Launch(*each)
        for name, (q, k), p in (("exact", (query, key), partition), ("exact, 32,760 tokens", cut, short)):
            inputs = p, 0, p.num_video_tokens, scale, p.num_blocks
            run = functools.partial(exact_kernels.group_lse, q, k, *inputs, launch=launch)
            yield f"{name} {tuple(launch)}", run, functools.partial(_error, lambda run=run: run().mT, q, k, p, "exact")
    stats = cell_stats(key, gate_cells(partition))
    for each in CELLS:
        launch = cell_gate_kernels.Launch(*each)
        run = functools.partial(cell_gate_kernels.cell_scores, query, stats, blocks, 0, count, True, launch)
        yield f"spread {tuple(launch)}", run, functools.partial(_error, run, query, key, partition, "spread")


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if not query.is_cuda:
        return scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(query, key, value)


def _gate_error(query: Tensor, key: Tensor, partition: BlockPartition, gate: Any) -> float:
    return _error(lambda: gate_scores(query, key, partition, gate), query, key, partition, gate)


def _error(scores: Callable[[], Tensor], query: Tensor, key: Tensor, partition: BlockPartition, gate: Any) -> float:
    """The largest difference of a sample of scores from the same in plain PyTorch, float64 or what the gate rounds."""
    sample = torch.linspace(0, query.shape[2] - 1, SAMPLE, device=query.device).long()
    few = query[:, :, sample]
    if gate == "mean":
        expected = gate_scores(query.double(), key.double(), partition, "mean")[:, :, sample]
    elif gate == "exact":
        groups, scale = partition.num_blocks, query.shape[-1] ** -0.5
        expected = exact_gate.group_lse(few.double(), key.double(), partition, 0, SAMPLE, scale, groups).mT
    else:
        # On a CPU, with the roundings that the gate is defined with.
        stats = CellStats(*(x.cpu() for x in cell_stats(key, gate_cells(partition))))
        expected = cell_scores(few.cpu(), stats, partition.num_blocks, 0, SAMPLE, gate == "spread").to(query.device)
    return (scores()[:, :, sample].double() - expected).abs().max().item()


def _stats_error(key: Tensor, partition: BlockPartition) -> float:
    """The largest difference of means and variances from the same in plain PyTorch on a CPU, in units of the dtype."""
    found, expected = (cell_stats(x, gate_cells(partition)) for x in (key, key.cpu()))
    pairs = [(x.double().cpu(), y.double()) for x, y in zip(found[:2], expected[:2], strict=True)]
    unit = torch.finfo(key.dtype).eps
    return max(((x - y).abs() / (unit * y.abs() + 4e-6)).max().item() for x, y in pairs)


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """The run's facts, and a table of times and errors."""
    dense = rows[0]["ms"]
    lines = [
        [
            row["call"],
            number(row["ms"], 2),
            number(row["ms"] / dense if row["ms"] and dense else None, 3),
            "" if row.get("error") is None else f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    return (
        "\n".join([*script.head(facts, ""), *table(("call", "ms", "share of a dense forward", "largest error"), lines)])
        + "\n"
    )


def main() -> None:
    """Measures and writes the JSON file, and the table next to it."""
    script.run("bench.attention.masses", __doc__, measure, markdown)


if __name__ == "__main__":
    main()
