"""Triton kernels of coarse keys that forward needs: which of them each query attends, and their part in its output.

Which coarse keys a query attends is packed first, 64 to a word, so that a tile of attention loads one word for each of
its queries and 64 coarse keys. Bits are in an order that lets a thread find them without a shift: tensor cores leave a
thread the scores of two of every eight keys, always the same two. So of 64 keys, the first eight of every sixteen are
in the word's lower half, the others in its upper half, where key ``c`` is bit ``8 * (c // 16) + c % 8``.

Shapes: ``H`` heads of all samples, ``S`` queries, ``C`` coarse keys, ``G`` groups, ``W = ceil(C / 64)`` words.
"""

import triton
import triton.language as tl

from block_masks.launching.launch import QuickLaunch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@QuickLaunch
@triton.jit
def words_kernel(
    group, bias, selected, words, log2_bias, rows, cells, head_step, row_step, group_step, ROWS: tl.constexpr
):
    """Packs one word of some rows of one head: each group that its coarse keys are parts of is read once.

    ``selected`` is 0 or 1, as uint8. The first programs also write the bias of the word's coarse keys in base 2, and
    zero after the last one.
    """
    word, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, 64)
    cell = word * 64 + index
    which = tl.load(group + cell, mask=cell < cells, other=-1).to(tl.int32)
    if (tl.program_id(0) == 0) & (head == 0):
        tl.store(log2_bias + cell, tl.load(bias + cell, mask=cell < cells, other=0.0) * LOG2E)
    first, last = tl.min(tl.where(cell < cells, which, 2**31 - 1), 0), tl.max(which, 0)
    bit, upper = _bit(index), index // 8 % 2 == 1
    at = selected + head * head_step + row.to(tl.int64) * row_step
    low, high = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    chosen = tl.load(at + first * group_step, mask=row < rows, other=1)
    for this in range(first, last + 1):
        # The next group's choices are on their way while this one's are packed.
        after = tl.load(at + tl.minimum(this + 1, last) * group_step, mask=row < rows, other=1)
        skipped = chosen.to(tl.int32) - 1
        low |= skipped & tl.sum(tl.where((which == this) & ~upper, bit, 0), 0)
        high |= skipped & tl.sum(tl.where((which == this) & upper, bit, 0), 0)
        chosen = after
    both = (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(words + (head * tl.num_programs(1) + word) * rows + row, both, mask=row < rows)


@triton.jit
def _bit(index):
    """The bit of a coarse key in its half of a word, as int32."""
    return tl.full((), 1, tl.int32) << (index % 64 // 16 * 8 + index % 8)


@triton.jit
def attended(words, row, rows, inside, start, cells, BLOCK_N: tl.constexpr, CELL_AXIS: tl.constexpr):
    """Which of the coarse keys from ``start`` on each row attends; false outside.

    Args:
        words: of one head.
        row: of the words, int32.
        rows: in all.
        inside: which rows there are.
        start: a multiple of ``BLOCK_N``.
        cells: in all.
        BLOCK_N: coarse keys, at most 128.
        CELL_AXIS: the axis of the result that they lie on; rows lie on the other one.
    """
    index = tl.arange(0, BLOCK_N)
    if BLOCK_N < 64:
        index += start % 64
    upper = tl.expand_dims(index // 8 % 2 == 1, 1 - CELL_AXIS)
    at = words + start // 64 * rows + row
    half = _half(tl.load(at, mask=inside, other=0), upper, CELL_AXIS)
    if BLOCK_N > 64:
        more = tl.load(at + rows, mask=inside & (start + 64 < cells), other=0)
        half = tl.where(tl.expand_dims(index < 64, 1 - CELL_AXIS), half, _half(more, upper, CELL_AXIS))
    return (half & tl.expand_dims(_bit(index), 1 - CELL_AXIS)) != 0


@triton.jit
def _half(word, upper, CELL_AXIS: tl.constexpr):
    """The half of each row's word that holds each coarse key."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    return tl.where(upper, tl.expand_dims(high, CELL_AXIS), tl.expand_dims(low, CELL_AXIS))


@triton.jit
def load_cells(x, start, cells, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``COUNT`` coarse keys or values of ``x (cells, D)`` from ``start`` on, zero outside."""
    cell, dim = start + tl.arange(0, COUNT)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = cell < cells if D == BLOCK_D else (cell < cells) & (dim < D)
    return tl.load(x + cell * D + dim, mask=mask, other=0.0)


@triton.jit
def _scores(
    q, keys, log2_bias, words, row, rows, inside, start, cells, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of some coarse keys ``(queries, coarse keys)``, and which count."""
    counts = attended(words, row, rows, inside, start, cells, BLOCK_N, 1)
    more = tl.load(log2_bias + start + tl.arange(0, BLOCK_N))
    k = load_cells(keys, start, cells, BLOCK_N, D, BLOCK_D)
    return tl.dot(q, k.T, input_precision=PRECISION) * factor + more[None, :], counts


@triton.jit
def _sums(
    q, keys, values, log2_bias, words, row, rows, inside, cells, factor, base,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over coarse keys of ``2 ** (score - base)`` times their values, and of that weight itself."""
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, cells, BLOCK_N):
        score, counts = _scores(
            q, keys, log2_bias, words, row, rows, inside, start, cells, factor, D, BLOCK_D, BLOCK_N, PRECISION
        )
        p = tl.where(counts, tl.exp2(score - base[:, None]), 0.0)
        v = load_cells(values, start, cells, BLOCK_N, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        total += tl.sum(p, 1)
    return acc, total


@QuickLaunch
@triton.jit
def merge_kernel(
    query, keys, values, log2_bias, words, output, lse, merged, merged_lse,
    scale, queries, cells, repeats, together, rows,
    LIMIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of ``BLOCK_M`` queries over all coarse keys, merged into their output.

    Weights are relative to a query's own log-sum-exp, so its sums need no running maximum: coarse keys weigh as much as
    what it chose, a little or much more. Where that comes to more than ``LIMIT``, or a query chose nothing, the tile
    finds its maxima first and starts over.
    """
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M
    query_row = first + tl.arange(0, BLOCK_M)
    inside, row = query_row < queries, query_row // together
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    place = head * queries + query_row
    q = tl.load(query + place[:, None] * D + dim, mask=inside[:, None] & (dim < D), other=0.0)
    keys += head // repeats * cells * D
    values += head // repeats * cells * DV
    words += head * tl.cdiv(cells, 64) * rows
    factor = scale * LOG2E
    own = tl.load(lse + place, mask=inside, other=0.0)
    of_rows = own * LOG2E
    base = of_rows
    acc, total = _sums(
        q, keys, values, log2_bias, words, row, rows, inside, cells, factor, base,
        D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    in_range = (total < LIMIT) & (of_rows != -float("inf"))
    if tl.max((inside & ~in_range).to(tl.int32), 0) != 0:
        top = of_rows
        for start in range(0, cells, BLOCK_N):
            score, counts = _scores(
                q, keys, log2_bias, words, row, rows, inside, start, cells, factor, D, BLOCK_D, BLOCK_N, PRECISION
            )
            top = tl.maximum(top, tl.max(tl.where(counts, score, -float("inf")), 1))
        base = tl.where(top == -float("inf"), 0.0, top)
        acc, total = _sums(
            q, keys, values, log2_bias, words, row, rows, inside, cells, factor, base,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    # Where nothing is added, what there was stays as it is, to the bit.
    nothing = total == 0.0
    sums = tl.exp2(of_rows - base) + total
    weight = tl.where(nothing, 1.0, tl.exp2(of_rows - base) / sums)
    tail = tl.where(nothing, 0.0, 1 / sums)
    at = place[:, None] * DV + value_dim
    mask = inside[:, None] & (value_dim < DV)
    x = tl.load(output + at, mask=mask, other=0.0).to(tl.float32)
    x = x * weight[:, None] + acc * tail[:, None]
    tl.store(merged + at, x.to(merged.dtype.element_ty), mask=mask)
    tl.store(merged_lse + place, tl.where(nothing, own, (base + tl.log2(sums)) * LN2), mask=inside)
