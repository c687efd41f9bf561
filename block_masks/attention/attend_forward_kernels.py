"""Triton kernel of attention over packed rows: each tile of rows runs a plain dense loop over its group's slots."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(x, start, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
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
    k = load_tile(keys, start, BLOCK_N, D, BLOCK_D, TMA)
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if PARTIAL:
        score = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * factor)
    p = tl.exp2(score * factor - new_top[:, None])
    keep = tl.exp2(top - new_top)
    v = load_tile(values, start, BLOCK_N, DV, BLOCK_DV, TMA)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, new_top, total * keep + tl.sum(p, 1)


@triton.jit
def row_forward_kernel(
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
    factor = tl.abs(scale) * LOG2E
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
