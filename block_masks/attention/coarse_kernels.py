"""Triton forms of the steps with coarse keys, loaded on first use on a CUDA device.

Which coarse keys a query attends is packed first, 64 to a word: bit c of ``words[h, w, row]`` is 1 where the row did
not choose the group of coarse key ``64 w + c``. A tile of attention then loads one word for each of its queries. No
atomics: gradients of coarse keys are summed over parts of the queries, then over the parts in a fixed order.

Shapes: ``H`` heads of all samples, ``S`` queries, ``C`` coarse keys, ``G`` groups, ``W = ceil(C / 64)`` words.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from block_masks.attention.attend_kernels import dot_width
from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.attention.launches import Tile, coarse_launch, dot_precision
from block_masks.launching import architecture
from block_masks.launching.launch import QuickLaunch

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@QuickLaunch
@triton.jit
def _words_kernel(group, selected, words, rows, cells, head_step, row_step, group_step, ROWS: tl.constexpr):
    """Packs the coarse keys of one word, for some rows of one head: each group that they are parts of is read once."""
    word, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, 64)
    cell = word * 64 + bit
    which = tl.load(group + cell, mask=cell < cells, other=-1)
    first = tl.min(tl.where(cell < cells, which, 2**31 - 1), 0)
    last = tl.max(which, 0)
    at = selected + head * head_step + row.to(tl.int64) * row_step
    bits = tl.zeros((ROWS,), tl.int64)
    for this in range(first, last + 1):
        parts = tl.sum(tl.where(which == this, tl.full((64,), 1, tl.int64) << bit.to(tl.int64), 0), 0)
        chosen = tl.load(at + this * group_step, mask=row < rows, other=1)
        bits |= tl.where(chosen == 0, parts, 0)
    tl.store(words + (head * tl.num_programs(1) + word) * rows + row, bits, mask=row < rows)


@triton.jit
def _logits(q, k, words, bias, row, start, cells, factor, inside, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Logits in base 2, ``(rows, coarse keys)``; -inf where a row chose the group, and outside."""
    cell = start + tl.arange(0, BLOCK_N)
    more = tl.load(bias + cell, mask=cell < cells, other=0.0) * _LOG2E
    word = tl.load(words + row, mask=inside, other=0)
    bit = start % 64 + tl.arange(0, BLOCK_N)
    attended = ((word[:, None] >> bit[None, :].to(tl.int64)) & 1) != 0
    score = tl.dot(q, k.T, input_precision=PRECISION) * factor + more[None, :]
    return tl.where(attended, score, -float("inf"))


@QuickLaunch
@triton.jit
def _merge_kernel(
    query, keys, values, bias, words, output, lse, merged, merged_lse, scale, queries, cells, repeats, together, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of ``BLOCK_M`` queries over all coarse keys, merged into their output."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < queries
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    place = head * queries + row
    q = tl.load(query + place[:, None] * D + dim, mask=inside[:, None] & (dim < D), other=0.0)
    keys += head // repeats * cells * D
    values += head // repeats * cells * DV
    words += head * tl.cdiv(cells, 64) * rows
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    factor = scale * _LOG2E
    for start in range(0, cells, BLOCK_N):
        cell = start + tl.arange(0, BLOCK_N)
        there = (cell < cells)[:, None]
        k = tl.load(keys + cell[:, None] * D + dim, mask=there & (dim < D), other=0.0)
        of_tile = words + start // 64 * rows
        score = _logits(q, k, of_tile, bias, row // together, start, cells, factor, inside, BLOCK_N, PRECISION)
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(score - base[:, None])
        keep = tl.exp2(top - base)
        v = tl.load(values + cell[:, None] * DV + value_dim, mask=there & (value_dim < DV), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        total = total * keep + tl.sum(p, 1)
        top = new_top
    own = tl.load(lse + place, mask=inside, other=0.0)
    of_rows = own * _LOG2E
    base = tl.where(top == -float("inf"), 0.0, top)
    whole = tl.maximum(of_rows, top)
    # Where nothing is added, what there was stays as it is, to the bit.
    nothing = total == 0.0
    sums = tl.exp2(of_rows - whole) + total * tl.exp2(base - whole)
    weight = tl.where(nothing, 1.0, tl.exp2(of_rows - whole) / sums)
    tail = tl.where(nothing, 0.0, tl.exp2(base - whole) / sums)
    at = place[:, None] * DV + value_dim
    mask = inside[:, None] & (value_dim < DV)
    x = tl.load(output + at, mask=mask, other=0.0).to(tl.float32)
    x = x * weight[:, None] + acc * tail[:, None]
    tl.store(merged + at, x.to(merged.dtype.element_ty), mask=mask)
    tl.store(merged_lse + place, tl.where(nothing, own, (whole + tl.log2(sums)) * _LN2), mask=inside)


@QuickLaunch
@triton.jit
def _query_backward_kernel(
    query, keys, values, bias, words, grad, lse, delta, grad_query,
    scale, queries, cells, repeats, together, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what all coarse keys give to the gradient of ``BLOCK_M`` queries."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < queries
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    place = head * queries + row
    mask = inside[:, None] & (dim < D)
    q = tl.load(query + place[:, None] * D + dim, mask=mask, other=0.0)
    do = tl.load(grad + place[:, None] * DV + value_dim, mask=inside[:, None] & (value_dim < DV), other=0.0)
    whole = tl.load(lse + place, mask=inside, other=0.0)[:, None] * _LOG2E
    mean = tl.load(delta + place, mask=inside, other=0.0)[:, None]
    keys += head // repeats * cells * D
    values += head // repeats * cells * DV
    words += head * tl.cdiv(cells, 64) * rows
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * _LOG2E
    for start in range(0, cells, BLOCK_N):
        cell = start + tl.arange(0, BLOCK_N)
        there = (cell < cells)[:, None]
        k = tl.load(keys + cell[:, None] * D + dim, mask=there & (dim < D), other=0.0)
        v = tl.load(values + cell[:, None] * DV + value_dim, mask=there & (value_dim < DV), other=0.0)
        of_tile = words + start // 64 * rows
        score = _logits(q, k, of_tile, bias, row // together, start, cells, factor, inside, BLOCK_N, PRECISION)
        p = tl.exp2(score - whole)
        ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - mean)
        ds = tl.where(score == -float("inf"), 0.0, ds)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    at = grad_query + place[:, None] * D + dim
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32) + acc * scale
    tl.store(at, x.to(grad_query.dtype.element_ty), mask=mask)


@QuickLaunch
@triton.jit
def _key_backward_kernel(
    query, keys, values, bias, words, grad, lse, delta, grad_keys, grad_values,
    scale, queries, cells, repeats, together, rows, heads, part_rows, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` coarse keys through a part of one query head's queries, in float32."""
    head, part = tl.program_id(1).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64)
    cell = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    there = (cell < cells)[:, None]
    first = head // repeats * cells
    k = tl.load(keys + (first + cell)[:, None] * D + dim, mask=there & (dim < D), other=0.0)
    v = tl.load(values + (first + cell)[:, None] * DV + value_dim, mask=there & (value_dim < DV), other=0.0)
    more = tl.load(bias + cell, mask=cell < cells, other=0.0)[:, None] * _LOG2E
    start = tl.program_id(0) // parts * BLOCK_N
    words += (head * tl.cdiv(cells, 64) + start // 64) * rows
    bit = (start % 64 + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    factor = scale * _LOG2E
    for first_row in range(0, part_rows, BLOCK_M):
        row = part * part_rows + first_row + tl.arange(0, BLOCK_M)
        inside = row < queries
        place = head * queries + row
        q = tl.load(query + place[:, None] * D + dim, mask=inside[:, None] & (dim < D), other=0.0)
        do = tl.load(grad + place[:, None] * DV + value_dim, mask=inside[:, None] & (value_dim < DV), other=0.0)
        whole = tl.load(lse + place, mask=inside, other=float("inf"))[None, :] * _LOG2E
        mean = tl.load(delta + place, mask=inside, other=0.0)[None, :]
        word = tl.load(words + row // together, mask=inside, other=0)[None, :]
        attended = ((word >> bit) & 1) != 0
        score = tl.dot(k, q.T, input_precision=PRECISION) * factor + more
        p = tl.where(attended, tl.exp2(score - whole), 0.0)
        grad_v = tl.dot(p.to(do.dtype), do, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - mean)
        ds = tl.where(attended, ds, 0.0)
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    place = (part * heads + head) * cells + cell
    tl.store(grad_keys + place[:, None] * D + dim, grad_k * scale, mask=there & (dim < D))
    tl.store(grad_values + place[:, None] * DV + value_dim, grad_v, mask=there & (value_dim < DV))


@QuickLaunch
@triton.jit
def _split_kernel(
    grad, output, lse, merged_lse, delta, grad_output, grad_lse, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
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


def split_grad(grad: Tensor, output: Tensor, lse: Tensor, merged_lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """See ``coarse_steps.split_grad``; all contiguous."""
    grad_output, grad_lse, dim = torch.empty_like(grad), torch.empty_like(lse), grad.shape[-1]
    _split_kernel[triton.cdiv(lse.numel(), 32),](
        grad, output, lse, merged_lse, delta, grad_output, grad_lse, lse.numel(),
        DV=dim, BLOCK_DV=max(8, triton.next_power_of_2(dim)), ROWS=32,
    )  # fmt: skip
    return grad_output, grad_lse


_WORD_BITS = 64  # the kernels spell it out
_PARTS = 12  # of the queries, to have as many programs as a GPU wants where coarse keys are few


def _options(kernel: Literal["merge", "query", "key"], query: Tensor, coarse: CoarseKeys) -> dict[str, object]:
    dim, value_dim = query.shape[-1], coarse.value.shape[-1]
    where, widths = architecture.architecture_of(query.device), (dot_width(dim), dot_width(value_dim))
    tile: Tile = getattr(coarse_launch(where, max(widths), query.dtype), kernel)
    return {
        "D": dim, "BLOCK_D": widths[0], "DV": value_dim, "BLOCK_DV": widths[1],
        "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "PRECISION": dot_precision(where, query.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def pack_words(coarse: CoarseKeys, selected: Tensor) -> Tensor:
    """Which coarse keys each row of ``selected (H, rows, G)`` attends, int64 ``(H, W, rows)``."""
    heads, rows, _ = selected.shape
    cells = len(coarse.bias)
    words = torch.empty(heads, triton.cdiv(cells, _WORD_BITS), rows, dtype=torch.int64, device=selected.device)
    _words_kernel[triton.cdiv(rows, 512), words.shape[1], heads](
        coarse.group, selected, words, rows, cells, *selected.stride(), ROWS=512
    )
    return words


def _inputs(query: Tensor, coarse: CoarseKeys, selected: Tensor) -> tuple[Tensor, ...]:
    key, value, bias = (x.contiguous() for x in coarse[:3])
    return query, key, value, bias, pack_words(coarse, selected)


def _sizes(query: Tensor, coarse: CoarseKeys, selected: Tensor, scale: float, together: int) -> tuple[float | int, ...]:
    return scale, query.shape[1], len(coarse.bias), len(query) // len(coarse.key), together, selected.shape[1]


def merge_coarse(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, output: Tensor, lse: Tensor, merged: tuple[Tensor, Tensor],
    scale: float, together: int = 1,
) -> None:  # fmt: skip
    """See ``coarse_steps.merge_coarse``; query, output and lse contiguous."""
    options = _options("merge", query, coarse)
    _merge_kernel[triton.cdiv(query.shape[1], options["BLOCK_M"]), len(query)](
        *_inputs(query, coarse, selected), output, lse, *merged, *_sizes(query, coarse, selected, scale, together),
        **options,
    )  # fmt: skip


def coarse_backward(
    query: Tensor, coarse: CoarseKeys, selected: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor,
    scale: float, together: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``coarse_steps.coarse_backward``; all but ``selected`` contiguous."""
    inputs = *_inputs(query, coarse, selected), grad, lse, delta
    sizes = _sizes(query, coarse, selected, scale, together)
    heads, queries, _ = query.shape
    options = _options("query", query, coarse)
    _query_backward_kernel[triton.cdiv(queries, options["BLOCK_M"]), heads](*inputs, grad_query, *sizes, **options)
    options = _options("key", query, coarse)
    cells = len(coarse.bias)
    part_rows = triton.cdiv(triton.cdiv(queries, _PARTS), options["BLOCK_M"]) * options["BLOCK_M"]
    parts = triton.cdiv(queries, part_rows)
    sums = [torch.empty(parts, heads, cells, x.shape[-1], dtype=torch.float32, device=x.device) for x in coarse[:2]]
    _key_backward_kernel[triton.cdiv(cells, options["BLOCK_N"]) * parts, heads](
        *inputs, *sums, *sizes, heads, part_rows, parts, **options
    )
    grad_key, grad_value = (
        total.unflatten(1, (len(x), -1)).sum((0, 2)).to(x.dtype) for total, x in zip(sums, coarse[:2], strict=True)
    )
    return grad_key, grad_value
