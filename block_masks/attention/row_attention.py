"""Attention over packed rows, forward and backward, as one registered op.

``torch.compile`` and checkpointing see through it as through any op. Forward runs a section of heads at a time: the
rows of its queries attend their group's slots, and a query's rows are merged by their log-sum-exp. Only the inputs, the
output and the log-sum-exp of each query are kept for backward, which plans the rows again and takes each row's part in
its query from the merged log-sum-exp: ``p = exp(score - lse)``.

Three backends do the work on the rows: ``"eager"``, plain PyTorch on any device (``row_steps.py``), ``"triton"``
(``attend_kernels.py``) and ``"flash"`` (``flash_kernels.py``); the latter two move rows by ``row_kernels.py``. The last
one attends whole tiles alone, and padding slots are taken out as rows are merged: ``slot_attention.py``
says how.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from block_masks.attention import row_steps
from block_masks.attention.row_steps import Merged
from block_masks.launching.device import on_device
from block_masks.plans.rows import plan_rows
from block_masks.plans.section import sections_of
from block_masks.plans.slots import Slots, ValidSlots


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    slots: Slots,
    *,
    row_tiles: tuple[int, int],
    heads: tuple[int, int],
    scale: float,
    backend: str,
    group_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the keys of the groups that it chose, at the price of the pairs that it chose.

    Args:
        query: ``(H, S, D)``.
        key: ``(key heads, keys, D)``; query head h uses key head ``h // (H // key heads)``.
        value: ``(key heads, keys, value dim)``.
        selected: bool ``(H, S, G)``: which groups each query chose; fastest where S is contiguous.
        slots: of these keys and groups.
        row_tiles: tiles of rows to make room for in a section, see ``plan_rows``; in forward and in backward, which
            holds more for each row.
        heads: heads of a section, divisors of H, likewise.
        scale: factor on the scores.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        group_lengths: int32 ``(H, G)``: how many of a group's keys, the first ones, the queries of a head attend; all
            if None. At least one where a query chose the group. For ``"flash"`` the same in all heads that share a key
            head.

    Returns:
        The output ``(H, S, value dim)``, 0 where a query chose nothing, and the natural log-sum-exp of each query's
        scores ``(H, S)``, float32, or float64 for float64 inputs. Gradients flow through the output alone; those of key
        and value are zero at keys that ``group_lengths`` leaves out.
    """
    return _attend(
        query, key, value, selected, group_lengths, *slots.flat, list(row_tiles), list(heads), scale, backend
    )


@torch.library.custom_op("block_masks::attend_packed", mutates_args=())
@on_device
def _attend(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    slot_tensors: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool,
    row_tiles: list[int], heads: list[int], scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    move, attend = _modules(backend)
    slots = Slots.of_flat(slot_tensors, group_sizes, tile_size, sorted_keys)
    valid = _valid(group_lengths, slots, len(query) // len(key), backend)
    query = query.contiguous()
    keys, values = (_in_slots(x, slots, move, valid) for x in (key, value))
    plan = plan_rows(selected, row_tiles[0], heads[0], tile_size)
    padding_lse = None
    if backend == "flash" and not (slots.whole and valid is None):
        from block_masks.attention import padding_kernels

        valid = valid or slots.valid(slots.group_lengths[None])
        last_keys = move.take_slots(keys, valid.last)[None]
        padding_lse = padding_kernels.padding_lse(query[None], last_keys, valid.padding, selected[None], scale, 1)[0]
        keys = move.take_slots(keys, valid.copied(slots))
    output, lse = query.new_empty(*query.shape[:2], value.shape[-1]), _like_lse(query)
    for section in sections_of(plan, slots, group_lengths):
        rows = attend.forward(query, keys, values, section, scale)
        part = section.of_heads
        padding = None if padding_lse is None else padding_lse[part]
        move.merge_rows(*rows, *section.query_rows, output[part], lse[part], padding)
        del rows
    return output, lse


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:2], value.shape[-1]), _like_lse(query)


@torch.library.custom_op("block_masks::attend_packed_backward", mutates_args=())
@on_device
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    output: Tensor, lse: Tensor, slot_tensors: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool,
    row_tiles: list[int], heads: list[int], scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    move, attend = _modules(backend)
    slots = Slots.of_flat(slot_tensors, group_sizes, tile_size, sorted_keys)
    valid = _valid(group_lengths, slots, len(query) // len(key), backend)
    grad, query = grad.contiguous(), query.contiguous()
    keys, values = (_in_slots(x, slots, move, valid) for x in (key, value))
    plan = plan_rows(selected, row_tiles[1], heads[1], tile_size)
    merged = Merged(grad, lse, move.delta(grad, output))
    grad_query = torch.empty_like(query)
    # Of each query head, summed over those that share a key head at the end.
    grad_keys, grad_values = (x.new_empty(len(query), *x.shape[1:]) for x in (keys, values))
    for section in sections_of(plan, slots, group_lengths):
        rows = attend.backward(query, keys, values, merged, (grad_keys, grad_values), section, scale)
        move.sum_rows(rows, *section.query_rows, grad_query[section.of_heads])
        del rows
    repeats = len(query) // len(key)
    if slots.in_place and repeats == 1 and valid is None:
        return grad_query, grad_keys, grad_values
    key_slot = slots.key_slot if valid is None else valid.key_slot(slots)
    grad_key, grad_value = (move.take_slots(x, key_slot, repeats) for x in (grad_keys, grad_values))
    return grad_query, grad_key, grad_value


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output, *inputs[5])
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[6:]


def _backward_of_attend(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # a checkpoint gives them out once
    slot_tensors = list(saved[7:])
    grads = _attend_backward(grad, *saved[:7], slot_tensors, *ctx.settings)
    return *grads, None, None, [None] * len(slot_tensors), *[None] * 7


_attend.register_autograd(_backward_of_attend, setup_context=_save)


def _valid(group_lengths: Tensor | None, slots: Slots, repeats: int, backend: str) -> ValidSlots | None:
    """For each key head the keys that are there; None where all are, or where the kernels themselves count them."""
    return None if group_lengths is None or backend != "flash" else slots.valid(group_lengths[::repeats])


def _in_slots(x: Tensor, slots: Slots, move: ModuleType, valid: ValidSlots | None) -> Tensor:
    """Keys or values ``(key heads, keys, D)`` in slots, contiguous; zero in those of keys that are not there."""
    x = x.contiguous()
    if valid is not None:
        return move.take_slots(x, valid.slot_key(slots))
    return x if slots.in_place else move.take_slots(x, slots.slot_key)


def _like_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _modules(backend: str) -> tuple[ModuleType, ModuleType]:
    """What moves rows, and what attends them. Triton and FlashAttention-4 are imported on first use."""
    if backend == "eager":
        return row_steps, row_steps
    from block_masks.attention import row_kernels

    if backend == "flash":
        from block_masks.attention import flash_kernels

        return row_kernels, flash_kernels
    from block_masks.attention import attend_kernels

    return row_kernels, attend_kernels
