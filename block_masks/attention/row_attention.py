"""Attention over packed rows, forward and backward, as one registered op.

``torch.compile`` and checkpointing see through it as through any op. Forward runs a section of heads at a time: the
rows of its queries attend their group's slots, and a query's rows are merged by their log-sum-exp; then coarse keys of
the groups that it did not choose are merged in, if there are any. Backward keeps only the inputs, the output and the
log-sum-exp of each query. It plans the rows again, and takes each row's part in its query from the merged log-sum-exp:
``p = exp(score - lse)``. Coarse keys need nothing else either. A plan that was made before is used by both if there is
room for its sections.

Three backends do the work: ``"eager"``, plain PyTorch on any device (``row_steps.py``), ``"triton"``
(``attend_kernels.py``) and ``"flash"`` (``flash_kernels.py``); the latter two move rows by ``row_kernels.py``.
FlashAttention-4 attends whole tiles only, so padding slots are removed as rows are merged: see ``slot_attention.py``.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from block_masks.attention import coarse_steps, row_steps
from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.attention.plain import plain_rows
from block_masks.attention.row_steps import Merged
from block_masks.launching.autograd import grad_of, save_of
from block_masks.launching.device import on_device
from block_masks.plans.rows import RowPlan, plan_rows
from block_masks.plans.section import sections_of
from block_masks.plans.slots import SLOT_TENSORS, Slots, ValidSlots

_SLOTS = len(SLOT_TENSORS)  # first in the list of an op's plans, before a row plan's tensors


class Room(NamedTuple):
    """The heads of a section, a divisor of all, and the tiles of rows to make room for; see ``plan_rows``."""

    heads: int
    row_tiles: int


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    slots: Slots,
    *,
    rooms: tuple[Room, Room],
    scale: float,
    backend: str,
    group_lengths: Tensor | None = None,
    coarse: CoarseKeys | None = None,
    plan: RowPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend_packed`` of checked inputs, with the samples' heads in one dim ``H``.

    Args:
        query: ``(H, S, D)``.
        key: ``(key heads, keys, D)``; query head h uses key head ``h // (H // key heads)``.
        value: ``(key heads, keys, value dim)``.
        selected: bool ``(H, S, G)``; fastest where S is contiguous.
        slots: of these keys and groups.
        rooms: of a section in forward, and in backward, which holds more for each row.
        scale: factor on the scores.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        group_lengths: int32 ``(H, G)``.
        coarse: keys of the groups that a query did not choose.
        plan: of these rows, if it is known.

    Returns:
        The output ``(H, S, value dim)`` and the log-sum-exp ``(H, S)``, which has no gradient.
    """
    of_slots, *sizes = slots.flat
    plans = of_slots if plan is None else [*of_slots, *plan.tensors]
    return _attend(
        query, key, value, selected, group_lengths, *(coarse or [None] * 4), plans, *sizes,
        [n for room in rooms for n in room], scale, backend,
    )  # fmt: skip


@torch.library.custom_op("block_masks::attend_packed", mutates_args=())
@on_device
def _attend(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool,
    rooms: list[int], scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    move, attend, tail = _modules(backend)
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    room = Room(*rooms[:2])
    valid = _valid(group_lengths, slots, len(query) // len(key), backend)
    query = query.contiguous()
    keys, values = (_in_slots(x, slots, move, valid) for x in (key, value))
    plan = _row_plan(selected, plans[_SLOTS:], room, tile_size)
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
    if coarse is None:
        return output, lse
    merged_lse = torch.empty_like(lse)
    tail.merge_coarse(query, coarse, selected, output, lse, (output, merged_lse), scale)
    return output, merged_lse


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:2], value.shape[-1]), _like_lse(query)


@torch.library.custom_op("block_masks::attend_packed_backward", mutates_args=())
@on_device
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    output: Tensor, lse: Tensor, plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool,
    rooms: list[int], scale: float, backend: str,
) -> list[Tensor]:  # fmt: skip
    move, attend, tail = _modules(backend)
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    room = Room(*rooms[2:])
    valid = _valid(group_lengths, slots, len(query) // len(key), backend)
    grad, query = grad.contiguous(), query.contiguous()
    keys, values = (_in_slots(x, slots, move, valid) for x in (key, value))
    plan = _row_plan(selected, plans[_SLOTS:], room, tile_size)
    merged = Merged(grad, lse, move.delta(grad, output))
    grad_query = torch.empty_like(query)
    # Of each query head, summed over those that share a key head at the end.
    grad_keys, grad_values = (x.new_empty(len(query), *x.shape[1:]) for x in (keys, values))
    for section in sections_of(plan, slots, group_lengths):
        rows = attend.backward(query, keys, values, merged, (grad_keys, grad_values), section, scale)
        move.sum_rows(rows, *section.query_rows, grad_query[section.of_heads])
        del rows
    grads = [grad_query, grad_keys, grad_values]
    repeats = len(query) // len(key)
    if not slots.in_place or repeats > 1 or valid is not None:
        key_slot = slots.key_slot if valid is None else valid.key_slot(slots)
        grads[1:] = [move.take_slots(x, key_slot, repeats) for x in (grad_keys, grad_values)]
    if coarse is not None:
        grads += tail.coarse_backward(query, coarse, selected, *merged, grad_query, scale)
    return grads


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> list[Tensor]:
    coarse = [x for x in others[2:4] if x is not None]
    return [x.new_empty(x.shape) for x in (query, key, value, *coarse)]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool,
    rooms: list[int], scale: float, backend: str,
) -> Tensor:  # fmt: skip
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    return plain_rows(query, key, value, selected, group_lengths, slots, scale, coarse)[0]


_attend.register_autograd(grad_of(_attend_backward, tensors=9, plain=_plain), setup_context=save_of(tensors=9))


def _row_plan(selected: Tensor, known: list[Tensor], room: Room, tile_size: int) -> RowPlan:
    """The plan that is known, if there is room for its sections; else a new one."""
    if known and known[1].shape[1] <= room.row_tiles:  # row_pool
        return RowPlan(*known, tile_size=tile_size)
    return plan_rows(selected, room.row_tiles, room.heads, tile_size)


def _valid(group_lengths: Tensor | None, slots: Slots, repeats: int, backend: str) -> ValidSlots | None:
    """The valid slots of each key head; None where all are, or where the kernels themselves count them."""
    return None if group_lengths is None or backend != "flash" else slots.valid(group_lengths[::repeats])


def _in_slots(x: Tensor, slots: Slots, move: ModuleType, valid: ValidSlots | None) -> Tensor:
    """Keys or values ``(key heads, keys, D)`` in slots, contiguous; zero in slots that are not valid."""
    x = x.contiguous()
    if valid is not None:
        return move.take_slots(x, valid.slot_key(slots))
    return x if slots.in_place else move.take_slots(x, slots.slot_key)


def _like_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _modules(backend: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    """What moves rows, attends them and merges coarse keys. Triton and FlashAttention-4 are imported on first use."""
    if backend == "eager":
        return row_steps, row_steps, coarse_steps
    from block_masks.attention import coarse_kernels, row_kernels

    if backend == "flash":
        from block_masks.attention import flash_kernels

        return row_kernels, flash_kernels, coarse_kernels
    from block_masks.attention import attend_kernels

    return row_kernels, attend_kernels, coarse_kernels
