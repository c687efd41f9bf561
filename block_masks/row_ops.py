"""The differentiable steps around attention over packed rows: gather queries, pad keys, merge outputs.

Each step is a registered op, so ``torch.compile`` and checkpointing see through it. It has an eager form here, which
runs anywhere, and a Triton form in ``row_kernels.py``, which runs on CUDA; tests hold the second to the first.
No step uses atomics: each gradient is a gather, and the same bits come out twice.
"""

from typing import Any

import torch
from torch import Tensor

from block_masks.rows import RowPlan


def gather_rows(query: Tensor, plan: RowPlan) -> Tensor:
    """Copies each query to its rows.

    Args:
        query: ``(H, S, D)``.
        plan: of these H heads and S queries.

    Returns:
        ``(rows, D)``; rows that only fill a tile are zero.
    """
    return _gather_rows(query, plan.row_query, plan.pair_row)


def pad_keys(x: Tensor, plan: RowPlan) -> Tensor:
    """Copies keys or values to their slots, each group in whole tiles.

    Args:
        x: ``(H, keys, D)``.
        plan: of these H heads and keys.

    Returns:
        ``(H * slots, D)``; slots that only fill a tile are zero.
    """
    return _gather_slots(x, plan.slot_key, plan.key_slot).flatten(0, 1)


def merge_rows(output: Tensor, lse: Tensor, plan: RowPlan) -> Tensor:
    """Merges each query's rows: the attention over all keys that any of its rows saw.

    Args:
        output: ``(rows, D)``, each row's softmax attention over its own keys.
        lse: float32 ``(rows,)``, the natural log-sum-exp of each row's scores.
        plan: of these rows.

    Returns:
        ``(H, S, D)`` in ``output``'s dtype; 0 where a query has no rows.
    """
    merged, _ = _merge_rows(output, lse, plan.pair_row, plan.row_query)
    return merged


def _or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` along dim 0, zero where the index is negative."""
    picked = rows.index_select(0, index.clamp(min=0).flatten().long()).unflatten(0, index.shape)
    return torch.where((index >= 0).view(*index.shape, *[1] * (picked.dim() - index.dim())), picked, 0)


@torch.library.custom_op("block_masks::take_rows", mutates_args=())
def _take_rows(source: Tensor, index: Tensor) -> Tensor:
    return _or_zero(source, index)


@_take_rows.register_fake
def _(source: Tensor, index: Tensor) -> Tensor:
    return source.new_empty(index.shape[0], source.shape[1])


# Keys to slots, the same in every head; the adjoint is the gather by the inverse index.


@torch.library.custom_op("block_masks::gather_slots", mutates_args=())
def _gather_slots(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    heads, keys, _ = x.shape
    first = torch.arange(heads, device=x.device)[:, None] * keys
    rows = torch.where(index >= 0, first + index, -1).to(torch.int32)
    return _take_rows(x.flatten(0, 1), rows.flatten()).unflatten(0, rows.shape)


@_gather_slots.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[0], x.shape[2])


def _save_slots(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_slots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return _gather_slots(grad, inverse, index), None, None


_gather_slots.register_autograd(_gather_slots_backward, setup_context=_save_slots)


# Queries to rows, and its adjoint, the sum over a query's rows.


@torch.library.custom_op("block_masks::gather_rows", mutates_args=())
def _gather_rows(query: Tensor, row_query: Tensor, pair_row: Tensor) -> Tensor:
    return _take_rows(query.flatten(0, 1), row_query)


@_gather_rows.register_fake
def _(query: Tensor, row_query: Tensor, pair_row: Tensor) -> Tensor:
    return query.new_empty(row_query.shape[0], query.shape[2])


def _save_pairs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _sum_rows(grad, *ctx.saved_tensors), None, None


_gather_rows.register_autograd(_gather_rows_backward, setup_context=_save_pairs)


@torch.library.custom_op("block_masks::sum_rows", mutates_args=())
def _sum_rows(rows: Tensor, pair_row: Tensor) -> Tensor:
    total = torch.zeros(
        pair_row.shape[0], pair_row.shape[2], rows.shape[1], dtype=_accumulator(rows), device=rows.device
    )
    for pairs in pair_row.unbind(1):
        total += _or_zero(rows, pairs)
    return total.to(rows.dtype)


@_sum_rows.register_fake
def _(rows: Tensor, pair_row: Tensor) -> Tensor:
    return rows.new_empty(pair_row.shape[0], pair_row.shape[2], rows.shape[1])


# Outputs of rows to outputs of queries, and its adjoint.


@torch.library.custom_op("block_masks::merge_rows", mutates_args=())
def _merge_rows(output: Tensor, lse: Tensor, pair_row: Tensor, row_query: Tensor) -> tuple[Tensor, Tensor]:
    exact = _accumulator(output)
    pair_lse = torch.where(pair_row >= 0, lse[pair_row.clamp(min=0).long()], -torch.inf).to(exact)
    merged_lse = pair_lse.logsumexp(1)
    merged = torch.zeros(*merged_lse.shape, output.shape[1], dtype=exact, device=output.device)
    for pairs, weight in zip(pair_row.unbind(1), _weights(pair_lse, merged_lse[:, None]).unbind(1), strict=True):
        # Times, not where: a NaN row must stay NaN, and rows that are not there are zero already.
        merged += weight[..., None] * _or_zero(output, pairs)
    return merged.to(output.dtype), merged_lse.to(lse.dtype)


@_merge_rows.register_fake
def _(output: Tensor, lse: Tensor, pair_row: Tensor, row_query: Tensor) -> tuple[Tensor, Tensor]:
    heads, _, queries = pair_row.shape
    return output.new_empty(heads, queries, output.shape[1]), lse.new_empty(heads, queries)


@torch.library.custom_op("block_masks::merge_rows_backward", mutates_args=())
def _merge_rows_backward(
    grad: Tensor, merged: Tensor, merged_lse: Tensor, output: Tensor, lse: Tensor, row_query: Tensor
) -> tuple[Tensor, Tensor]:
    exact = _accumulator(output)
    weight = torch.where(
        row_query >= 0, _weights(lse.to(exact), _or_zero(merged_lse.to(exact).flatten(), row_query)), 0
    )
    row_grad = _or_zero(grad.flatten(0, 1).to(exact), row_query)
    drop = row_grad * (output.to(exact) - _or_zero(merged.flatten(0, 1).to(exact), row_query))
    grad_lse = torch.where(row_query >= 0, weight * drop.sum(-1), 0)
    return (weight[:, None] * row_grad).to(output.dtype), grad_lse.to(lse.dtype)


@_merge_rows_backward.register_fake
def _(
    grad: Tensor, merged: Tensor, merged_lse: Tensor, output: Tensor, lse: Tensor, row_query: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty_like(lse)


def _save_merge(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, lse, _, row_query = inputs
    ctx.save_for_backward(*output, rows, lse, row_query)
    ctx.mark_non_differentiable(output[1])


def _merge_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_merge_rows_backward(grad.contiguous(), *ctx.saved_tensors), None, None


_merge_rows.register_autograd(_merge_backward, setup_context=_save_merge)


def _weights(part: Tensor, whole: Tensor) -> Tensor:
    """``exp(part - whole)``, 0 for parts that are not there, even if nothing is."""
    return torch.where(part == -torch.inf, 0, (part - whole).exp())


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# The Triton forms. Triton is imported on first use, and only where there is a CUDA device.


@_take_rows.register_kernel("cuda")
def _(source: Tensor, index: Tensor) -> Tensor:
    from block_masks import row_kernels

    return row_kernels.take_rows(source, index)


@_sum_rows.register_kernel("cuda")
def _(rows: Tensor, pair_row: Tensor) -> Tensor:
    from block_masks import row_kernels

    return row_kernels.sum_rows(rows, pair_row)


@_merge_rows.register_kernel("cuda")
def _(output: Tensor, lse: Tensor, pair_row: Tensor, row_query: Tensor) -> tuple[Tensor, Tensor]:
    from block_masks import row_kernels

    return row_kernels.merge_rows(output, lse, pair_row, row_query)


@_merge_rows_backward.register_kernel("cuda")
def _(
    grad: Tensor, merged: Tensor, merged_lse: Tensor, output: Tensor, lse: Tensor, row_query: Tensor
) -> tuple[Tensor, Tensor]:
    from block_masks import row_kernels

    return row_kernels.merge_rows_backward(grad, merged, merged_lse, output, lse, row_query)
