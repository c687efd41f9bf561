"""Triton forms of the plan of packed rows, loaded on first use on a CUDA device; see ``rows.plan_rows``."""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 512  # queries of a head that one program places


@triton.jit
def _count_kernel(selected, counts, queries, groups, chunks, head_step, query_step, group_step, CHUNK: tl.constexpr):
    pool, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    query = chunk * CHUNK + tl.arange(0, CHUNK)
    base = selected + (pool // groups).to(tl.int64) * head_step + (pool % groups).to(tl.int64) * group_step
    chosen = tl.load(base + query.to(tl.int64) * query_step, mask=query < queries, other=0)
    tl.store(counts + tl.program_id(0), tl.sum((chosen != 0).to(tl.int32), 0))


def count_pairs(selected: Tensor) -> Tensor:
    """Counts the queries that chose each group, a chunk of queries at a time.

    Args:
        selected: bool ``(H, S, G)``, any strides.

    Returns:
        int32 ``(H * G, chunks)``.
    """
    heads, queries, groups = selected.shape
    chunks = triton.cdiv(queries, _CHUNK)
    counts = torch.empty(heads * groups, chunks, dtype=torch.int32, device=selected.device)
    _count_kernel[heads * groups * chunks,](selected, counts, queries, groups, chunks, *selected.stride(), CHUNK=_CHUNK)
    return counts


@triton.jit
def _place_kernel(
    selected, before, first_tile, row_query, row_pool, query_rows, query_count,
    queries, groups, chunks, heads, row_tiles, head_step, query_step, group_step,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Numbers the rows of a chunk of a head's queries, group by group."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    query = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = query < queries
    base = selected + head.to(tl.int64) * head_step + query.to(tl.int64) * query_step
    listed = query_rows + head.to(tl.int64) * groups * queries + query
    step = tl.full((), 0, tl.int64) + queries
    section = (head // heads).to(tl.int64) * row_tiles
    count = tl.zeros((CHUNK,), tl.int32)
    for group in range(groups):
        pool = head * groups + group
        chosen = tl.load(base + group * (tl.full((), 0, tl.int64) + group_step), mask=inside, other=0) != 0
        rank = tl.cumsum(chosen.to(tl.int32), 0) - 1 + tl.load(before + pool * chunks + chunk)
        row = tl.load(first_tile + pool) * TILE + rank
        chosen = chosen & (row < row_tiles * TILE)
        tl.store(listed + count * step, row, mask=chosen)
        tl.store(row_query + section * TILE + row, head * queries + query, mask=chosen)
        tl.store(row_pool + section + row // TILE, tl.zeros_like(row) + pool, mask=chosen & (rank % TILE == 0))
        count += chosen.to(tl.int32)
    tl.store(query_count + head.to(tl.int64) * queries + query, count, mask=inside)


def place_rows(
    selected: Tensor, before: Tensor, first_tile: Tensor, row_tiles: int, heads: int, tile_size: int
) -> list[Tensor]:
    """Numbers the rows: the first four tensors of a ``RowPlan``.

    Args:
        selected: bool ``(H, S, G)``, any strides.
        before: int32 ``(H * G, chunks)``, pairs of the pool in earlier chunks.
        first_tile: int32 ``(H * G,)``, the first tile of each pool within its section.
        row_tiles: tiles of rows in a section.
        heads: heads in a section.
        tile_size: rows in a tile.
    """
    total, queries, groups = selected.shape
    sections, short = total // heads, {"dtype": torch.int32, "device": selected.device}
    row_query = torch.full((sections, row_tiles * tile_size), -1, **short)
    row_pool = torch.full((sections, row_tiles), -1, **short)
    query_rows = torch.empty(total, groups, queries, **short)
    query_count = torch.empty(total, queries, **short)
    chunks = before.shape[1]
    _place_kernel[total * chunks,](
        selected, before, first_tile, row_query, row_pool, query_rows, query_count,
        queries, groups, chunks, heads, row_tiles, *selected.stride(), TILE=tile_size, CHUNK=_CHUNK,
    )  # fmt: skip
    return [row_query, row_pool, query_rows, query_count]
