"""Triton forms of the steps around attention over packed rows, loaded on first use on a CUDA device.

All are bound by memory: each program moves a few rows of ``D`` values and the indices that it needs. Offsets are int64,
since rows times ``D`` may pass 2**31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.launching.launch import QuickLaunch
from block_masks.plans.move_kernels import take_slots

__all__ = ["delta", "merge_rows", "sum_rows", "take_slots"]


@QuickLaunch
@triton.jit
def _sum_kernel(
    rows, query_rows, query_count, total, queries, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)[None, :]
    count = tl.load(query_count + head * queries + query, mask=query < queries, other=0)
    listed = query_rows + head * groups * queries + query
    step = tl.full((), 0, tl.int64) + queries
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, tl.max(count, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            row = tl.load(listed + (start + i) * step, mask=start + i < count, other=-1).to(tl.int64)
            mask = (row >= 0)[:, None] & (dim < D)
            acc += tl.load(rows + row[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    target = total + (head * queries + query)[:, None] * D + dim
    tl.store(target, acc.to(total.dtype.element_ty), mask=(query < queries)[:, None] & (dim < D))


def sum_rows(rows: Tensor, query_rows: Tensor, query_count: Tensor, total: Tensor) -> None:
    """See ``row_steps.sum_rows``."""
    (heads, groups, queries), dim = query_rows.shape, rows.shape[1]
    _sum_kernel[heads * triton.cdiv(queries, 16),](
        rows, query_rows, query_count, total, queries, groups,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=16, UNROLL=4, num_warps=2,
    )  # fmt: skip


@triton.jit
def share_left(lse, padding_lse):
    """What padding slots leave of the sum of ``exp(score)``."""
    return 1 - tl.where(padding_lse == -float("inf"), 0.0, tl.exp(padding_lse - lse))


@QuickLaunch
@triton.jit
def _merge_kernel(
    output, lse, query_rows, query_count, padding_lse, merged, merged_lse, queries, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr, UNROLL: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """First the whole log-sum-exp, then the weighted sum: its loads wait for nothing but the list of rows."""
    blocks = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = query < queries
    dim = tl.arange(0, BLOCK_D)[None, :]
    count = tl.load(query_count + head * queries + query, mask=inside, other=0)
    listed = query_rows + head * groups * queries + query
    step = tl.full((), 0, tl.int64) + queries
    most = tl.max(count, 0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, most, LISTED):
        i = start + tl.arange(0, LISTED)[:, None]
        row = tl.load(listed[None, :] + i * step, mask=i < count[None, :], other=-1)
        part = tl.load(lse + row, mask=row >= 0, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(part, 0))
        # Tests for absence, not for -inf after the maximum: a NaN must reach the sums.
        keep = tl.where(top == -float("inf"), 0.0, tl.exp(top - new_top))
        add = tl.where(part == -float("inf"), 0.0, tl.exp(part - new_top[None, :]))
        total = total * keep + tl.sum(add, 0)
        top = new_top
    total = tl.where(total == 0, 1.0, total)
    whole = top + tl.log(total)
    if PADDING:
        of_padding = tl.load(padding_lse + head * queries + query, mask=inside, other=-float("inf"))
        left = share_left(whole, of_padding)
        whole += tl.log(left)
        total *= left
    whole = tl.where(count < 0, float("nan"), whole)  # not all of its rows had room
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, most, UNROLL):
        for i in tl.static_range(UNROLL):
            row = tl.load(listed + (start + i) * step, mask=start + i < count, other=-1).to(tl.int64)
            part = tl.load(lse + row, mask=row >= 0, other=-float("inf"))
            weight = tl.where(part == -float("inf"), 0.0, tl.exp(part - top) / total)
            mask = (row >= 0)[:, None] & (dim < D)
            acc += weight[:, None] * tl.load(output + row[:, None] * D + dim, mask=mask, other=0.0).to(tl.float32)
    acc = tl.where((count < 0)[:, None], float("nan"), acc)
    place = head * queries + query
    tl.store(merged + place[:, None] * D + dim, acc.to(merged.dtype.element_ty), mask=inside[:, None] & (dim < D))
    tl.store(merged_lse + place, whole, mask=inside)


def merge_rows(
    output: Tensor, lse: Tensor, query_rows: Tensor, query_count: Tensor, merged: Tensor, merged_lse: Tensor,
    padding_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """See ``row_steps.merge_rows``."""
    (heads, groups, queries), dim = query_rows.shape, output.shape[1]
    _merge_kernel[heads * triton.cdiv(queries, 16),](
        output, lse, query_rows, query_count, lse if padding_lse is None else padding_lse, merged, merged_lse,
        queries, groups, D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=16, LISTED=16, UNROLL=4,
        PADDING=padding_lse is not None, num_warps=2,
    )  # fmt: skip


@QuickLaunch
@triton.jit
def _delta_kernel(grad, output, delta, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DV)[None, :]
    mask = (row < rows)[:, None] & (dim < DV)
    g = tl.load(grad + row[:, None] * DV + dim, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(output + row[:, None] * DV + dim, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(g * o, 1), mask=row < rows)


def delta(grad: Tensor, output: Tensor) -> Tensor:
    """See ``row_steps.delta``."""
    out = torch.empty(grad.shape[:-1], dtype=torch.float32, device=grad.device)
    dim = grad.shape[-1]
    _delta_kernel[triton.cdiv(out.numel(), 32),](
        grad, output, out, out.numel(), DV=dim, BLOCK_DV=triton.next_power_of_2(dim), ROWS=32
    )
    return out
