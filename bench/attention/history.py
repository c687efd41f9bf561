"""What one new chunk of frames costs against a growing history: full attention, and ours with a tail.

    python -m bench.attention.history --output bench/results/<gpu>_<date>_history.json     # on a GPU

Frames of 24x64 tokens in chunks of 3, 12 heads, head dim 128, bfloat16, random inputs: 4,608 queries against 50,000
to a million keys. 56 blocks of 3x12x8 tokens are attended exactly, all others by cells of about 64 tokens. At the
shortest history, the dispatch is checked against ``"tiles"``. ``--device cpu --small`` tries it out.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.common import script
from bench.common.machine import error_text
from bench.common.report import number, table
from bench.common.timing import milliseconds
from vmoba_flex import BlockPartition, Tail, TopK, vmoba_attention

Row = dict[str, Any]


def measure(device: str, small: bool) -> list[Row]:
    """A row for each length of the history."""
    side, block, chunk, heads, dim = ((8, 8), (2, 4, 4), 2, 2, 16) if small else ((24, 64), (3, 12, 8), 3, 12, 128)
    lengths, rule = ((8, 16, 32, 64), TopK(4)) if small else ((33, 66, 132, 264, 528, 651), TopK(56))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator, rows = torch.Generator(device).manual_seed(0), []
    for frames in lengths:
        grid = (frames, *side)
        partition = BlockPartition.spatiotemporal(grid, block, causal_frames=chunk)
        shape = (1, heads, partition.num_tokens, dim)
        key, value = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        query = torch.randn(1, heads, chunk * side[0] * side[1], dim, generator=generator, device=device, dtype=dtype)
        new = functools.partial(_attend, query, key, value, partition, rule)
        row: Row = {"keys": partition.num_tokens, "blocks": partition.num_blocks, "queries": query.shape[2]}
        try:
            row["error"] = _largest(new("packed") - new("tiles")) if not rows else None
            row["dense_ms"] = milliseconds(functools.partial(scaled_dot_product_attention, query, key, value), device)
            row["ms"] = milliseconds(functools.partial(new, "packed"), device)
            row["gigabytes"] = _peak(functools.partial(new, "packed"), device)
        except Exception as error:  # such as a history that this GPU has no room for
            row |= {"failed": error_text(error)}
        rows.append(row)
        print(row, flush=True)
        del key, value, query, new
    return rows


@torch.no_grad()
def _attend(query: Tensor, key: Tensor, value: Tensor, partition: BlockPartition, rule: TopK, dispatch: Any) -> Tensor:
    """The newest chunk."""
    assert partition.causal_frames is not None
    frames = partition.grid[0] - partition.causal_frames, partition.grid[0]
    return vmoba_attention(
        query, key, value, partition, rule, query_frames=frames, tail=Tail(), dispatch=dispatch, backend="auto"
    )


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _peak(run: Any, device: str) -> float | None:
    """The most memory in a call, inputs included, in gigabytes; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e9


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """The run's facts, and a table of times, memory and errors."""
    lines = [
        [
            f"{row['keys']:,}",
            number(row.get("dense_ms"), 2),
            number(row.get("ms"), 2),
            number(row["dense_ms"] / row["ms"] if row.get("ms") else None, 2),
            number(row.get("gigabytes"), 1),
            "" if row.get("error") is None else f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    head = ("keys", "full attention ms", "ours ms", "times as fast", "GB", "largest error")
    return "\n".join([*script.head(facts, ""), *table(head, lines)]) + "\n"


def main() -> None:
    """Measures and writes the JSON file, and the table next to it."""
    script.run("bench.attention.history", __doc__, measure, markdown)


if __name__ == "__main__":
    main()
