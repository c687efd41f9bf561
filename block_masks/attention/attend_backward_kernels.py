"""Triton kernels of the gradients of attention over packed rows: one of queries, one of keys and values.

Both work with the merged output and log-sum-exp of each query: ``p = exp(score - lse)`` already holds the weight of a
row in its query, so neither the rows' outputs nor their log-sum-exps are needed again.
"""

import triton
import triton.language as tl

from block_masks.attention.attend_forward_kernels import LOG2E, load_tile


@triton.jit
def _query_backward_step(
    acc, q, do, whole_lse, mean, keys, values, start, left, factor,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of ``BLOCK_N`` slots to the gradient of rows."""
    k = load_tile(keys, start, BLOCK_N, D, BLOCK_D, TMA)
    v = load_tile(values, start, BLOCK_N, DV, BLOCK_DV, TMA)
    p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * factor - whole_lse)
    if PARTIAL:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - mean)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def row_query_backward_kernel(
    rows, keys, values, grad, lse, delta, row_pool, first_slot, pool_lengths, grad_rows,
    scale, groups, repeats, head_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BLOCK_M`` rows of queries through their group."""
    start_row = tl.program_id(0) * BLOCK_M
    pool = tl.load(row_pool + start_row // TILE)
    if pool < 0:
        return
    first = tl.load(first_slot + pool % groups) + pool // groups // repeats * head_slots
    size = tl.load(pool_lengths + pool)
    row = start_row + tl.arange(0, BLOCK_M)
    q = load_tile(rows, start_row, BLOCK_M, D, BLOCK_D, TMA)
    do = load_tile(grad, start_row, BLOCK_M, DV, BLOCK_DV, TMA)
    whole_lse = tl.load(lse + row)[:, None] * LOG2E
    mean = tl.load(delta + row)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * LOG2E
    whole = size // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc = _query_backward_step(
            acc, q, do, whole_lse, mean, keys, values, first + start, 0, factor,
            BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, False, TMA, PRECISION,
        )  # fmt: skip
    if whole < size:
        acc = _query_backward_step(
            acc, q, do, whole_lse, mean, keys, values, first + whole, size - whole, factor,
            BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, True, TMA, PRECISION,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)[None, :]
    acc = (acc * scale).to(grad_rows.dtype.element_ty)
    tl.store(grad_rows + row[:, None].to(tl.int64) * D + dim, acc, mask=dim < D)


@triton.jit
def row_key_backward_kernel(
    rows, keys, values, grad, lse, delta, first_tile, tiles, tile_group, first_slot, pool_lengths,
    grad_keys, grad_values, scale, first_head, groups, repeats, head_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` slots through one query head's rows of their group."""
    slot = tl.program_id(0) * BLOCK_N
    head = first_head + slot // head_slots
    pool = head * groups + tl.load(tile_group + slot % head_slots // TILE).to(tl.int32)
    key = head // repeats * head_slots + slot % head_slots
    k = load_tile(keys, key, BLOCK_N, D, BLOCK_D, TMA)
    v = load_tile(values, key, BLOCK_N, DV, BLOCK_DV, TMA)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    factor = scale * LOG2E
    start_row = tl.load(first_tile + pool) * TILE
    for start in range(start_row, start_row + tl.load(tiles + pool) * TILE, BLOCK_M):
        q = load_tile(rows, start, BLOCK_M, D, BLOCK_D, TMA)
        do = load_tile(grad, start, BLOCK_M, DV, BLOCK_DV, TMA)
        whole_lse = tl.load(lse + start + tl.arange(0, BLOCK_M))[None, :] * LOG2E
        mean = tl.load(delta + start + tl.arange(0, BLOCK_M))[None, :]
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * factor - whole_lse)
        grad_v = tl.dot(p.to(do.dtype), do, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - mean)
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    # Unattended slots get zero gradient.
    left = tl.load(first_slot + pool % groups) + tl.load(pool_lengths + pool) - slot % head_slots
    live = tl.arange(0, BLOCK_N)[:, None] < left
    grad_k, grad_v = tl.where(live, grad_k * scale, 0.0), tl.where(live, grad_v, 0.0)
    place = (first_head * head_slots + slot).to(tl.int64) + tl.arange(0, BLOCK_N)[:, None]
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    tl.store(grad_keys + place * D + dim, grad_k.to(grad_keys.dtype.element_ty), mask=dim < D)
    tl.store(grad_values + place * DV + value_dim, grad_v.to(grad_values.dtype.element_ty), mask=value_dim < DV)
