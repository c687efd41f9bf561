"""Times vmoba_attention beside dense attention on one GPU, and writes the table as JSON.

python bench/attention.py --output bench/results/<gpu>_<date>.json
"""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from block_masks import gather_rows, merge_rows, pad_keys, plan_rows
from vmoba_flex import BlockPartition, Threshold, vmoba_attention
from vmoba_flex.compiled import compiled_flex_attention_with_lse
from vmoba_flex.gate import gate
from vmoba_flex.mask import group_sizes
from vmoba_flex.packed import max_row_tiles
from vmoba_flex.selection import select

GRID = (24, 36, 64)
KINDS = {
    "1D, 8 slabs": BlockPartition.temporal(GRID, 3),
    "2D, 48 windows": BlockPartition.spatial(GRID, (6, 8)),
    "3D, 72 cubes": BlockPartition.spatiotemporal(GRID, (8, 12, 8)),
}


def milliseconds(call: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> float:
    """Median device time of a call."""
    times = []
    for _ in range(warmup + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[warmup:])


def measure(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> dict[str, float]:
    """Forward and forward + backward times, and peak memory above the inputs."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves).backward(upstream)

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    result = {"forward_ms": milliseconds(forward), "forward_backward_ms": milliseconds(step)}
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return result | {"peak_gb_above_inputs": (torch.cuda.max_memory_allocated() - before) / 1e9}


@torch.no_grad()
def stages(leaves: list[Tensor], partition: BlockPartition, rule: Threshold) -> dict[str, float]:
    """Forward time of each stage of the packed dispatch, in ms; those after the selection for two heads."""
    query, key, value = leaves
    own = torch.nn.functional.one_hot(partition.block_ids("cuda"), partition.num_blocks).bool()
    scores = gate(query, key, partition)
    selection = select(scores, own, rule)
    two = slice(0, 2)
    tiles = max_row_tiles(partition, rule, query.shape[1], 2)
    assert tiles is not None  # the rule caps its pools
    ids, sizes = partition.block_ids("cuda"), group_sizes(partition)
    plan = plan_rows(selection[0, two], ids, sizes, tiles)
    rows, keys, values = gather_rows(query[0, two], plan), pad_keys(key[0, two], plan), pad_keys(value[0, two], plan)

    def attend() -> tuple[Tensor, Tensor]:
        inputs = (x[None, None] for x in (rows, keys, values))
        return compiled_flex_attention_with_lse(*inputs, block_mask=plan.block_mask, scale=None)

    output, lse = attend()
    return {
        "gate_ms": milliseconds(lambda: gate(query, key, partition)),
        "select_ms": milliseconds(lambda: select(scores, own, rule)),
        "plan_ms": milliseconds(lambda: plan_rows(selection[0, two], ids, sizes, tiles)),
        "gather_ms": milliseconds(lambda: gather_rows(query[0, two], plan)),
        "pad_keys_ms": milliseconds(lambda: (pad_keys(key[0, two], plan), pad_keys(value[0, two], plan))),
        "attention_ms": milliseconds(attend),
        "merge_ms": milliseconds(lambda: merge_rows(output[0, 0], lse[0, 0], plan)),
    }


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.compiler.config.recompile_limit = 64  # one function is compiled for each row of the table
    torch.manual_seed(0)
    shape = (1, args.heads, KINDS["1D, 8 slabs"].num_tokens, 128)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    rows = []

    def run(name: str, attend: Callable[..., Tensor], **facts: float) -> None:
        rows.append({"name": name} | facts | measure(attend, leaves, upstream))
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in rows[-1].items()))

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            run(f"dense, {backend.name}", torch.nn.functional.scaled_dot_product_attention)
    rule = Threshold(0.25, max_density=0.25)
    for kind, partition in KINDS.items():
        query, key, value = leaves
        _, stats = vmoba_attention(query, key, value, partition, rule, return_stats=True)
        facts = {"density": stats.density.mean().item(), "tile_density": stats.tile_density.mean().item()}
        for dispatch in ("tiles", "packed"):

            def attend(*inputs: Tensor, partition: BlockPartition = partition, dispatch: str = dispatch) -> Tensor:
                query, key, value = inputs
                return vmoba_attention(query, key, value, partition, rule, dispatch=dispatch)

            run(f"{dispatch}, {kind}", attend, **facts)
            run(f"{dispatch}, {kind}, torch.compile", torch.compile(attend, fullgraph=True, dynamic=False), **facts)
        rows.append({"name": f"stages of packed, {kind}, one head group"} | stages(leaves, partition, rule))
        print(rows[-1])
    report = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": {"batch_heads_tokens_dim": shape, "grid": GRID, "dtype": "bfloat16", "rule": repr(rule)},
        "command": f"python bench/attention.py --heads {args.heads}",
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
