"""Triton kernels of coarse keys that backward needs, and of what of a gradient goes to what they were merged into.

No atomics: gradients of coarse keys are summed over parts of the queries, then over the parts in a fixed order.
"""

import triton
import triton.language as tl

from block_masks.attention.coarse_forward_kernels import LOG2E, attended, load_cells
from block_masks.launching.launch import QuickLaunch


@QuickLaunch
@triton.jit
def query_backward_kernel(
    query, keys, values, log2_bias, words, grad, lse, delta, grad_query,
    scale, queries, cells, repeats, together, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what all coarse keys give to the gradient of ``BLOCK_M`` queries."""
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M
    query_row = first + tl.arange(0, BLOCK_M)
    inside, row = query_row < queries, query_row // together
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    place = head * queries + query_row
    mask = inside[:, None] & (dim < D)
    q = tl.load(query + place[:, None] * D + dim, mask=mask, other=0.0)
    do = tl.load(grad + place[:, None] * DV + value_dim, mask=inside[:, None] & (value_dim < DV), other=0.0)
    whole = tl.load(lse + place, mask=inside, other=0.0)[:, None] * LOG2E
    mean = tl.load(delta + place, mask=inside, other=0.0)[:, None]
    keys += head // repeats * cells * D
    values += head // repeats * cells * DV
    words += head * tl.cdiv(cells, 64) * rows
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * LOG2E
    for start in range(0, cells, BLOCK_N):
        counts = attended(words, row, rows, inside, start, cells, BLOCK_N, 1)
        more = tl.load(log2_bias + start + tl.arange(0, BLOCK_N))
        k = load_cells(keys, start, cells, BLOCK_N, D, BLOCK_D)
        v = load_cells(values, start, cells, BLOCK_N, DV, BLOCK_DV)
        score = tl.dot(q, k.T, input_precision=PRECISION) * factor + more[None, :]
        p = tl.where(counts, tl.exp2(score - whole), 0.0)
        ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - mean)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    at = grad_query + place[:, None] * D + dim
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32) + acc * scale
    tl.store(at, x.to(grad_query.dtype.element_ty), mask=mask)


@QuickLaunch
@triton.jit
def key_backward_kernel(
    query, keys, values, log2_bias, words, grad, lse, delta, grad_keys, grad_values,
    scale, queries, cells, repeats, together, rows, heads, part_rows, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` coarse keys through a part of one query head's queries, in float32."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(0) % parts
    start = tl.program_id(0) // parts * BLOCK_N
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k = load_cells(keys + head // repeats * cells * D, start, cells, BLOCK_N, D, BLOCK_D)
    v = load_cells(values + head // repeats * cells * DV, start, cells, BLOCK_N, DV, BLOCK_DV)
    cell = start + tl.arange(0, BLOCK_N)
    more = tl.load(log2_bias + cell, mask=cell < cells, other=0.0)[:, None]
    words += head * tl.cdiv(cells, 64) * rows
    query += head * queries * D
    grad += head * queries * DV
    lse += head * queries
    delta += head * queries
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    factor = scale * LOG2E
    first, end = part * part_rows, tl.minimum(part * part_rows + part_rows, queries)
    for first_row in range(first, end, BLOCK_M):
        query_row = first_row + tl.arange(0, BLOCK_M)
        inside = query_row < end
        q = load_cells(query, first_row, end, BLOCK_M, D, BLOCK_D)
        do = load_cells(grad, first_row, end, BLOCK_M, DV, BLOCK_DV)
        whole = tl.load(lse + query_row, mask=inside, other=0.0)[None, :] * LOG2E
        mean = tl.load(delta + query_row, mask=inside, other=0.0)[None, :]
        counts = attended(words, query_row // together, rows, inside, start, cells, BLOCK_N, 0)
        score = tl.dot(k, q.T, input_precision=PRECISION) * factor + more
        p = tl.where(counts, tl.exp2(score - whole), 0.0)
        grad_v = tl.dot(p.to(do.dtype), do, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - mean)
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    place = (part * heads + head) * cells + cell
    there = (cell < cells)[:, None]
    tl.store(grad_keys + place[:, None] * D + dim, grad_k * scale, mask=there & (dim < D))
    tl.store(grad_values + place[:, None] * DV + value_dim, grad_v, mask=there & (value_dim < DV))


@triton.jit
def _sum_parts(
    sums, total, head, cell, heads, cells, repeats, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of some coarse keys or values of one key head."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (cell < cells)[:, None] & (dim < D)
    x = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for part in range(parts):
        for repeat in range(repeats):
            at = (part * heads + head * repeats + repeat) * cells + cell
            x += tl.load(sums + at[:, None] * D + dim, mask=mask, other=0.0)
    tl.store(total + (head * cells + cell)[:, None] * D + dim, x.to(total.dtype.element_ty), mask=mask)


@QuickLaunch
@triton.jit
def sum_parts_kernel(
    key_sums, value_sums, grad_keys, grad_values, heads, cells, repeats, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts, and the query heads of a key head, in order."""
    head, cell = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _sum_parts(key_sums, grad_keys, head, cell, heads, cells, repeats, parts, D, BLOCK_D, BLOCK)
    _sum_parts(value_sums, grad_values, head, cell, heads, cells, repeats, parts, DV, BLOCK_DV, BLOCK)


@QuickLaunch
@triton.jit
def split_kernel(
    grad, output, lse, merged_lse, delta, grad_output, grad_lse, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See ``coarse_steps.split_grad``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    dim = tl.arange(0, BLOCK_DV)[None, :]
    at, mask = row[:, None] * DV + dim, inside[:, None] & (dim < DV)
    own = tl.load(lse + row, mask=inside, other=0.0)
    weight = tl.where(own == -float("inf"), 0.0, tl.exp(own - tl.load(merged_lse + row, mask=inside, other=0.0)))
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(output + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_output + at, (g * weight[:, None]).to(grad_output.dtype.element_ty), mask=mask)
    of_lse = weight * (tl.sum(g * o, 1) - tl.load(delta + row, mask=inside, other=0.0))
    tl.store(grad_lse + row, of_lse, mask=inside)
