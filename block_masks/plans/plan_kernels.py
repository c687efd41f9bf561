"""Triton forms of the plans of packed rows and slots, loaded on first use on a CUDA device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch

_CHUNK = 512  # queries of a head that one program places


@QuickLaunch
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


@QuickLaunch
@triton.jit
def _pools_kernel(counted, first_tile, tiles, pools, chunks, row_tiles, TILE: tl.constexpr, POOLS: tl.constexpr):
    """Shares out the tiles of a section to its pools."""
    before = 0
    for start in range(0, pools, POOLS):
        pool = start + tl.arange(0, POOLS)
        inside, at = pool < pools, tl.program_id(0) * pools + pool
        pairs = tl.load(counted + at * chunks + (chunks - 1), mask=inside, other=0)
        wanted = (pairs + (TILE - 1)) // TILE
        end = before + tl.cumsum(wanted, 0)
        first = tl.minimum(end - wanted, row_tiles)
        tl.store(first_tile + at, first, mask=inside)
        tl.store(tiles + at, tl.minimum(end, row_tiles) - first, mask=inside)
        before += tl.sum(wanted, 0)


def pool_tiles(counted: Tensor, sections: int, row_tiles: int, tile_size: int) -> list[Tensor]:
    """See ``rows._pool_tiles``.

    Args:
        counted: int32 ``(H * G, chunks)``, pairs of the pool up to the end of each chunk.
        sections: of as many heads each.
        row_tiles: tiles of rows in a section.
        tile_size: rows in a tile.
    """
    pools, chunks = len(counted) // sections, counted.shape[1]
    first_tile, tiles = counted.new_empty(len(counted)), counted.new_empty(len(counted))
    _pools_kernel[sections,](counted, first_tile, tiles, pools, chunks, row_tiles, TILE=tile_size, POOLS=1024)
    return [first_tile, tiles]


@QuickLaunch
@triton.jit
def _place_kernel(
    selected, counted, first_tile, row_query, row_pool, query_rows, query_count,
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
    lost = tl.zeros((CHUNK,), tl.int32)
    for group in range(groups):
        pool = head * groups + group
        chosen = tl.load(base + group * (tl.full((), 0, tl.int64) + group_step), mask=inside, other=0) != 0
        before = tl.load(counted + pool * chunks + chunk - 1, mask=chunk > 0, other=0)
        rank = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
        row = tl.load(first_tile + pool) * TILE + rank
        lost = lost | (chosen & (row >= row_tiles * TILE)).to(tl.int32)
        chosen = chosen & (row < row_tiles * TILE)
        tl.store(listed + count * step, row, mask=chosen)
        tl.store(row_query + section * TILE + row, head * queries + query, mask=chosen)
        tl.store(row_pool + section + row // TILE, tl.zeros_like(row) + pool, mask=chosen & (rank % TILE == 0))
        count += chosen.to(tl.int32)
    tl.store(query_count + head.to(tl.int64) * queries + query, tl.where(lost != 0, -1, count), mask=inside)


def place_rows(
    selected: Tensor, counted: Tensor, first_tile: Tensor, row_tiles: int, heads: int, tile_size: int
) -> list[Tensor]:
    """Numbers the rows: the first four tensors of a ``RowPlan``, see ``rows.plan_rows``.

    Args:
        selected: bool ``(H, S, G)``, any strides.
        counted: int32 ``(H * G, chunks)``, pairs of the pool up to the end of each chunk.
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
    chunks = counted.shape[1]
    _place_kernel[total * chunks,](
        selected, counted, first_tile, row_query, row_pool, query_rows, query_count,
        queries, groups, chunks, heads, row_tiles, *selected.stride(), TILE=tile_size, CHUNK=_CHUNK,
    )  # fmt: skip
    return [row_query, row_pool, query_rows, query_count]


@QuickLaunch
@triton.jit
def _count_keys_kernel(key_group, counts, group_lengths, keys, chunks, CHUNK: tl.constexpr):
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    there = tl.load(key_group + key, mask=key < keys, other=-1) == group
    count = tl.sum(there.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), count)
    tl.atomic_add(group_lengths + group, count)


@QuickLaunch
@triton.jit
def _place_keys_kernel(
    key_group, counts, group_lengths, slot_key, key_slot, slot_group, tile_group, tile_keys, first_slot,
    keys, chunks, num_tiles,
    TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Places a chunk of a group's keys; the group's first program describes its tiles too."""
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    other, earlier = tl.arange(0, GROUPS), tl.arange(0, CHUNKS)
    sizes = tl.load(group_lengths + other, mask=other < group, other=0)
    first_tile = tl.sum((sizes + (TILE - 1)) // TILE, 0)
    first = first_tile * TILE
    before = tl.sum(tl.load(counts + group * chunks + earlier, mask=earlier < chunk, other=0), 0)
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    there = tl.load(key_group + key, mask=key < keys, other=-1) == group
    slot = first + before + tl.cumsum(there.to(tl.int32), 0) - 1
    tl.store(slot_key + slot, key.to(tl.int64), mask=there)
    tl.store(slot_group + slot, tl.zeros_like(slot) + group, mask=there)
    tl.store(key_slot + key, slot.to(tl.int64), mask=there)
    if chunk == 0:
        size = tl.load(group_lengths + group)
        tiles = (size + (TILE - 1)) // TILE
        tl.store(first_slot + group, first)
        padding = first + size + tl.arange(0, SPAN)
        filling = padding < first + tiles * TILE
        tl.store(slot_key + padding, tl.full((SPAN,), -1, tl.int64), mask=filling)
        tl.store(slot_group + padding, tl.full((SPAN,), -1, tl.int32), mask=filling)
        for start in range(0, tiles, SPAN):
            tile = start + tl.arange(0, SPAN)
            inside = (tile < tiles) & (first_tile + tile < num_tiles)
            tl.store(tile_group + first_tile + tile, tl.zeros_like(tile).to(tl.int64) + group, mask=inside)
            valid = tl.minimum(size - tile * TILE, TILE)
            tl.store(tile_keys + first_tile + tile, valid.to(tl.int64), mask=inside)


def place_keys(key_group: Tensor, groups: int, num_tiles: int, tile_size: int) -> list[Tensor]:
    """Places keys in slots: the tensors of ``Slots``, see ``slots.plan_slots``.

    Args:
        key_group: int64 ``(keys,)``, contiguous.
        groups: how many there are, each with a key.
        num_tiles: tiles that they fill.
        tile_size: slots in a tile.
    """
    (keys,), short = key_group.shape, {"dtype": torch.int32, "device": key_group.device}
    chunks, slots = triton.cdiv(keys, _CHUNK), num_tiles * tile_size
    counts, group_lengths = torch.empty(groups * chunks, **short), torch.zeros(groups, **short)
    first_slot, slot_group = torch.empty(groups, **short), torch.empty(slots, **short)
    slot_key, key_slot = key_group.new_empty(slots), key_group.new_empty(keys)
    tile_group, tile_keys = key_group.new_empty(num_tiles), key_group.new_empty(num_tiles)
    _count_keys_kernel[groups * chunks,](key_group, counts, group_lengths, keys, chunks, CHUNK=_CHUNK)
    _place_keys_kernel[groups * chunks,](
        key_group, counts, group_lengths, slot_key, key_slot, slot_group, tile_group, tile_keys, first_slot,
        keys, chunks, num_tiles, TILE=tile_size, CHUNK=_CHUNK, CHUNKS=triton.next_power_of_2(chunks),
        GROUPS=triton.next_power_of_2(groups), SPAN=triton.next_power_of_2(tile_size),
    )  # fmt: skip
    return [slot_key, key_slot, slot_group, tile_group, tile_keys, first_slot, group_lengths]
