"""Triton kernels of attention over packed rows, loaded on first use on a CUDA device.

A tile of rows holds queries that chose one group of keys, so a program runs a plain dense loop over that group's slots.
Backward works with the merged output and log-sum-exp of each query: ``p = exp(score - lse)`` already holds the weight
of a row in its query, so neither the rows' outputs nor their log-sum-exps are needed again. No atomics: each program
owns what it writes, and two runs give the same bits.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import functools
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.attention.launches import Tile, attend_launch, dot_precision
from block_masks.attention.row_steps import Merged
from block_masks.launching import architecture
from block_masks.plans import move_kernels
from block_masks.plans.section import Section

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(x, start, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """``COUNT`` rows of ``x (rows, D)`` from ``start`` on, through a descriptor or through pointers."""
    if TMA:
        tile = x.load([start, 0])
    else:
        dim = tl.arange(0, BLOCK_D)[None, :]
        pointers = x + (tl.full((), 0, tl.int64) + start) * D + tl.arange(0, COUNT)[:, None] * D + dim
        tile = tl.load(pointers) if D == BLOCK_D else tl.load(pointers, mask=dim < D, other=0.0)
    return tile


@triton.jit
def _forward_step(
    acc, top, total, q, keys, values, start, left, factor,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``BLOCK_N`` slots; if ``PARTIAL``, only the first ``left`` are valid. ``factor`` > 0."""
    k = _load_tile(keys, start, BLOCK_N, D, BLOCK_D, TMA)
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if PARTIAL:
        score = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * factor)
    p = tl.exp2(score * factor - new_top[:, None])
    keep = tl.exp2(top - new_top)
    v = _load_tile(values, start, BLOCK_N, DV, BLOCK_DV, TMA)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, new_top, total * keep + tl.sum(p, 1)


@triton.jit
def _query_backward_step(
    acc, q, do, whole_lse, mean, keys, values, start, left, factor,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    PARTIAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of ``BLOCK_N`` slots to the gradient of rows."""
    k = _load_tile(keys, start, BLOCK_N, D, BLOCK_D, TMA)
    v = _load_tile(values, start, BLOCK_N, DV, BLOCK_DV, TMA)
    p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * factor - whole_lse)
    if PARTIAL:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - mean)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _forward_kernel(
    query, keys, values, row_query, row_pool, first_slot, pool_lengths, output, lse, scale, groups, repeats, head_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention of ``BLOCK_M`` rows over their group: normalised output, and natural log-sum-exp."""
    start_row = tl.program_id(0) * BLOCK_M
    pool = tl.load(row_pool + start_row // TILE)
    if pool < 0:
        return
    first = tl.load(first_slot + pool % groups) + pool // groups // repeats * head_slots
    size = tl.load(pool_lengths + pool)
    row = start_row + tl.arange(0, BLOCK_M)
    place = tl.load(row_query + row).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(query + place[:, None] * D + dim, mask=(place >= 0)[:, None] & (dim < D), other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    # The maximum is taken before scaling, so a negative scale negates the query instead.
    factor = tl.abs(scale) * _LOG2E
    if scale < 0:
        q = -q
    whole = size // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, top, total = _forward_step(
            acc, top, total, q, keys, values, first + start, 0, factor,
            BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, False, TMA, PRECISION,
        )  # fmt: skip
    if whole < size:
        acc, top, total = _forward_step(
            acc, top, total, q, keys, values, first + whole, size - whole, factor,
            BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, True, TMA, PRECISION,
        )  # fmt: skip
    tl.store(lse + row, (top + tl.log2(total)) * _LN2)
    acc = (acc / total[:, None]).to(output.dtype.element_ty)
    dim = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(output + row[:, None].to(tl.int64) * DV + dim, acc, mask=dim < DV)


@triton.jit
def _query_backward_kernel(
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
    q = _load_tile(rows, start_row, BLOCK_M, D, BLOCK_D, TMA)
    do = _load_tile(grad, start_row, BLOCK_M, DV, BLOCK_DV, TMA)
    whole_lse = tl.load(lse + row)[:, None] * _LOG2E
    mean = tl.load(delta + row)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * _LOG2E
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
def _key_backward_kernel(
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
    k = _load_tile(keys, key, BLOCK_N, D, BLOCK_D, TMA)
    v = _load_tile(values, key, BLOCK_N, DV, BLOCK_DV, TMA)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    factor = scale * _LOG2E
    start_row = tl.load(first_tile + pool) * TILE
    for start in range(start_row, start_row + tl.load(tiles + pool) * TILE, BLOCK_M):
        q = _load_tile(rows, start, BLOCK_M, D, BLOCK_D, TMA)
        do = _load_tile(grad, start, BLOCK_M, DV, BLOCK_DV, TMA)
        whole_lse = tl.load(lse + start + tl.arange(0, BLOCK_M))[None, :] * _LOG2E
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


class _Launch:
    """What the three kernels share: dims, tile shapes and how they read tiles."""

    def __init__(
        self, kernel: Literal["forward", "query", "key"], rows: Tensor, values: Tensor, tile_size: int
    ) -> None:
        dim, value_dim = rows.shape[-1], values.shape[-1]
        padded, value_padded = dot_width(dim), dot_width(value_dim)
        where = architecture.architecture_of(rows.device)
        launch = attend_launch(where, max(padded, value_padded), rows.dtype)
        tile: Tile = getattr(launch, kernel)
        self.block_m, self.block_n = min(tile.rows, tile_size), min(tile.keys, tile_size)
        # Descriptors need rows of whole 16 bytes.
        self.tma = launch.descriptors and all(d * rows.element_size() % 16 == 0 for d in (dim, value_dim))
        self.options = {
            "D": dim, "BLOCK_D": padded, "DV": value_dim, "BLOCK_DV": value_padded,
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "TILE": tile_size, "TMA": self.tma,
            "PRECISION": dot_precision(where, rows.dtype), "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def tiles(self, x: Tensor, count: int) -> object:
        """``x (..., D)`` as the kernels take it, read ``count`` rows at a time."""
        if not self.tma:
            return x
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = x.flatten(0, -2)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [count, dot_width(x.shape[1])])


def dot_width(dim: int) -> int:
    """The least width of a tile that holds ``dim`` and that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(dim))


_LEAST_SCALE = 1e-30


def forward(query: Tensor, keys: Tensor, values: Tensor, section: Section, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a section's rows; see ``row_steps.forward``."""
    # Masked scores are -inf before scaling, and a scale of zero would make them NaN.
    scale = scale if abs(scale) > _LEAST_SCALE else _LEAST_SCALE
    rows = len(section.row_query)
    output = query.new_empty(rows, values.shape[-1])
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    launch = _Launch("forward", query, values, section.plan.tile_size)
    _forward_kernel[rows // launch.block_m,](
        query, launch.tiles(keys, launch.block_n), launch.tiles(values, launch.block_n),
        section.row_query, section.row_pool, section.slots.first_slot, section.pool_lengths, output, lse,
        scale, section.groups, len(query) // len(keys), keys.shape[1], **launch.options,
    )  # fmt: skip
    return output, lse


def backward(
    query: Tensor, keys: Tensor, values: Tensor, merged: Merged, grads: tuple[Tensor, Tensor], section: Section,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients through a section's rows; see ``row_steps.backward``."""
    # Gathered once: reading rows where the queries lie costs the loop over rows more than a third of its speed.
    take = functools.partial(move_kernels.take_rows, row_query=section.row_query, row_pool=section.row_pool)
    rows, row_grads = take(query.flatten(0, 1)), take(merged.grad.flatten(0, 1))
    row_lse, row_delta = take(merged.lse.flatten(), fill=torch.inf), take(merged.delta.flatten())
    plan, slots, pools = section.plan, section.slots, (section.slots.first_slot, section.pool_lengths)
    groups, repeats, head_slots = section.groups, len(query) // len(keys), keys.shape[1]
    grad_rows = torch.empty_like(rows)

    def tiles(launch: _Launch) -> list[object]:
        counts = launch.block_m, launch.block_n, launch.block_n, launch.block_m
        return [launch.tiles(x, n) for x, n in zip((rows, keys, values, row_grads), counts, strict=True)]

    launch = _Launch("query", rows, values, plan.tile_size)
    _query_backward_kernel[len(rows) // launch.block_m,](
        *tiles(launch), row_lse, row_delta, section.row_pool, *pools, grad_rows, scale, groups, repeats, head_slots,
        **launch.options,
    )  # fmt: skip
    launch = _Launch("key", rows, values, plan.tile_size)
    _key_backward_kernel[section.heads * head_slots // launch.block_n,](
        *tiles(launch), row_lse, row_delta, plan.first_tile, plan.tiles, slots.tile_group, *pools, *grads,
        scale, section.first_head, groups, repeats, head_slots, **launch.options,
    )  # fmt: skip
    return grad_rows
