"""Triton forms of the ops of ``rows.py`` and ``row_ops.py``, loaded on first use on a CUDA device.

All are bound by memory: each program moves a few rows of ``D`` values and the indices that it needs. Offsets are int64,
since rows times ``D`` may pass 2**31.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


@triton.jit
def _rows_to_queries_kernel(pair_row, row_query, pairs, queries, groups, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(pair_row + pair, mask=pair < pairs, other=-1)
    query = pair // (queries * groups) * queries + pair % queries
    tl.store(row_query + row, query.to(tl.int32), mask=row >= 0)


def rows_to_queries(pair_row: Tensor, rows: int) -> Tensor:
    """See ``rows._rows_to_queries``."""
    _, groups, queries = pair_row.shape
    row_query = torch.full((rows,), -1, dtype=torch.int32, device=pair_row.device)
    pairs = pair_row.numel()
    _rows_to_queries_kernel[triton.cdiv(pairs, 1024),](pair_row, row_query, pairs, queries, groups, BLOCK=1024)
    return row_query


@triton.jit
def _take_kernel(source, index, target, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (dim < D)
    where = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    x = tl.load(source + where[:, None] * D + dim, mask=(where >= 0)[:, None] & (dim < D), other=0.0)
    tl.store(target + row[:, None] * D + dim, x, mask=inside)


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """See ``row_ops._take_rows``."""
    source = source.contiguous()
    rows, dim = index.shape[0], source.shape[1]
    target = source.new_empty(rows, dim)
    _take_kernel[triton.cdiv(rows, _ROWS),](
        source, index, target, rows, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=_ROWS
    )
    return target


@triton.jit
def _sum_kernel(rows, pair_row, total, queries, groups, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for group in range(groups):
        row = tl.load(pair_row + (head * groups + group) * queries + query, mask=query < queries, other=-1).to(tl.int64)
        acc += tl.load(rows + row[:, None] * D + dim, mask=(row >= 0)[:, None] & (dim < D), other=0.0).to(tl.float32)
    target = total + (head * queries + query)[:, None] * D + dim
    tl.store(target, acc.to(total.dtype.element_ty), mask=(query < queries)[:, None] & (dim < D))


def sum_rows(rows: Tensor, pair_row: Tensor) -> Tensor:
    """See ``row_ops._sum_rows``."""
    (heads, groups, queries), dim = pair_row.shape, rows.shape[1]
    total = rows.new_empty(heads, queries, dim)
    _sum_kernel[heads * triton.cdiv(queries, _ROWS),](
        rows.contiguous(), pair_row, total, queries, groups, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=_ROWS
    )
    return total


@triton.jit
def _merge_kernel(
    output,
    lse,
    pair_row,
    merged,
    merged_lse,
    queries,
    groups,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for group in range(groups):
        row = tl.load(pair_row + (head * groups + group) * queries + query, mask=query < queries, other=-1).to(tl.int64)
        there = row >= 0
        part = tl.load(lse + row, mask=there, other=-float("inf"))
        x = tl.load(output + row[:, None] * D + dim, mask=there[:, None] & (dim < D), other=0.0).to(tl.float32)
        new_top = tl.maximum(top, part)
        keep = tl.where(top == -float("inf"), 0.0, tl.exp(top - new_top))
        # Tests for absence, not for -inf after the maximum: a NaN must reach the sums.
        add = tl.where(part == -float("inf"), 0.0, tl.exp(part - new_top))
        acc = acc * keep[:, None] + add[:, None] * x
        weights = weights * keep + add
        top = new_top
    empty = weights == 0
    acc = acc / tl.where(empty, 1.0, weights)[:, None]
    place = head * queries + query
    inside = query < queries
    tl.store(merged + place[:, None] * D + dim, acc.to(merged.dtype.element_ty), mask=inside[:, None] & (dim < D))
    tl.store(merged_lse + place, top + tl.log(tl.where(empty, 1.0, weights)), mask=inside)


def merge_rows(output: Tensor, lse: Tensor, pair_row: Tensor, row_query: Tensor) -> tuple[Tensor, Tensor]:
    """See ``row_ops._merge_rows``."""
    (heads, groups, queries), dim = pair_row.shape, output.shape[1]
    merged, merged_lse = output.new_empty(heads, queries, dim), lse.new_empty(heads, queries)
    _merge_kernel[heads * triton.cdiv(queries, _ROWS),](
        output.contiguous(),
        lse.contiguous(),
        pair_row,
        merged,
        merged_lse,
        queries,
        groups,
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        ROWS=_ROWS,
    )
    return merged, merged_lse


@triton.jit
def _merge_backward_kernel(
    grad, merged, merged_lse, output, lse, row_query, grad_output, grad_lse, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    query = tl.load(row_query + row, mask=row < rows, other=-1).to(tl.int64)
    there = query >= 0
    mask = there[:, None] & (dim < D)
    from_query = query[:, None] * D + dim
    upstream = tl.load(grad + from_query, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(merged + from_query, mask=mask, other=0.0).to(tl.float32)
    own = tl.load(output + row[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    part = tl.load(lse + row, mask=there, other=-float("inf"))
    whole = tl.load(merged_lse + query, mask=there, other=0.0)
    weight = tl.where(part == -float("inf"), 0.0, tl.exp(part - whole))
    inside = row < rows
    gradient = (weight[:, None] * upstream).to(grad_output.dtype.element_ty)
    tl.store(grad_output + row[:, None] * D + dim, gradient, mask=inside[:, None] & (dim < D))
    tl.store(grad_lse + row, weight * tl.sum(upstream * (own - mean), 1), mask=inside)


def merge_rows_backward(
    grad: Tensor, merged: Tensor, merged_lse: Tensor, output: Tensor, lse: Tensor, row_query: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``row_ops._merge_rows_backward``."""
    rows, dim = output.shape
    output, lse = output.contiguous(), lse.contiguous()
    grad_output, grad_lse = torch.empty_like(output), torch.empty_like(lse)
    _merge_backward_kernel[triton.cdiv(rows, _ROWS),](
        grad.contiguous(), merged, merged_lse, output, lse, row_query, grad_output, grad_lse, rows,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=_ROWS,
    )  # fmt: skip
    return grad_output, grad_lse
