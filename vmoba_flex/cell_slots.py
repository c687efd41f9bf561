"""Keys and values in slots, and the means of their cells, in one pass over both; forward and backward.

Shapes: ``B`` batch, ``H`` key heads, ``S`` tokens, ``C`` cells, ``D`` head dim.
"""

from typing import Any

import torch
from torch import Tensor

from block_masks import CoarseKeys, Slots
from block_masks.launching.device import on_device
from block_masks.launching.transforms import in_transform
from block_masks.plans.moves import take_slots
from block_masks.plans.slots import ValidSlots
from vmoba_flex.cells import (
    cell_groups,
    cells_of,
    count_cells,
    has_kernels,
    plain_means,
    plain_spread,
)
from vmoba_flex.partition import BlockPartition
from vmoba_flex.tail import Cells, Tail


def slots_and_cells(
    key: Tensor, value: Tensor, partition: BlockPartition, tail: Tail, slots: Slots, valid: ValidSlots | None = None
) -> tuple[Tensor, Tensor, CoarseKeys]:
    """``to_slots`` of key and value, and their ``coarse_keys``: each token is read once. Differentiable.

    Args:
        key: ``(B, H, S, D)`` in raster order, prefix and suffix included.
        value: ``(B, H, S, value dim)``.
        partition: the blocks.
        tail: their cells.
        slots: of these tokens.
        valid: which of each sample's tokens are valid; all if None.

    Returns:
        Keys ``(B, H, slots, D)`` and values ``(B, H, slots, value dim)``, zero in slots without a valid token, and
        ``B * H`` heads of ``C`` coarse keys.
    """
    cells = Cells(partition, tail.cell_of(partition))
    slot_key = slots.slot_key if valid is None else valid.slot_key(slots)
    key_slot = slots.key_slot if valid is None else valid.key_slot(slots)
    move = _plain if in_transform(key, value) else _slots_and_means
    moved = move(key, value, slot_key, key_slot, partition.flat, list(cells.cell))
    return moved[0], moved[1], CoarseKeys(moved[2].flatten(0, 1), moved[3].flatten(0, 1), *moved[4:])


@torch.library.custom_op("vmoba_flex::slots_and_means", mutates_args=())
@on_device
def _slots_and_means(
    key: Tensor, value: Tensor, slot_key: Tensor, key_slot: Tensor, partition: list[int], cell: list[int]
) -> list[Tensor]:
    if has_kernels(key) and has_kernels(value):
        from vmoba_flex import cell_slot_kernels

        return cell_slot_kernels.slots_and_means(key, value, slot_key, key_slot, cells_of(partition, cell))
    return _plain(key, value, slot_key, key_slot, partition, cell)


def _plain(
    key: Tensor, value: Tensor, slot_key: Tensor, key_slot: Tensor, partition: list[int], cell: list[int]
) -> list[Tensor]:
    del key_slot
    cells, both = cells_of(partition, cell), (key, value)
    in_slots = [take_slots(x.flatten(0, 1), slot_key).unflatten(0, x.shape[:2]) for x in both]
    return [*in_slots, *(plain_means(x, cells) for x in both), *cell_groups(cells, key)]


@_slots_and_means.register_fake
def _(
    key: Tensor, value: Tensor, slot_key: Tensor, key_slot: Tensor, partition: list[int], cell: list[int]
) -> list[Tensor]:
    counts = slot_key.shape[-1], count_cells(partition, cell)
    moved = [x.new_empty(*x.shape[:2], count, x.shape[3]) for count in counts for x in (key, value)]
    bias = key.new_empty(counts[1], dtype=torch.promote_types(key.dtype, torch.float32))
    return [*moved, bias, key.new_empty(counts[1], dtype=torch.int64)]


@torch.library.custom_op("vmoba_flex::slots_and_means_backward", mutates_args=())
@on_device
def _backward_op(
    key_slots: Tensor, value_slots: Tensor, key_means: Tensor, value_means: Tensor, slot_key: Tensor, key_slot: Tensor,
    partition: list[int], cell: list[int],
) -> list[Tensor]:  # fmt: skip
    cells, in_slots, means = cells_of(partition, cell), (key_slots, value_slots), (key_means, value_means)
    if has_kernels(key_means) and has_kernels(value_means):
        from vmoba_flex import cell_slot_kernels

        return cell_slot_kernels.slots_and_means_backward(in_slots, means, key_slot, cells)
    moved = (take_slots(x.flatten(0, 1), key_slot).unflatten(0, x.shape[:2]) for x in in_slots)
    return [x + plain_spread(mean, cells) for x, mean in zip(moved, means, strict=True)]


@_backward_op.register_fake
def _(
    key_slots: Tensor, value_slots: Tensor, key_means: Tensor, value_means: Tensor, slot_key: Tensor, key_slot: Tensor,
    *_: object,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(*x.shape[:2], key_slot.shape[-1], x.shape[3]) for x in (key_slots, value_slots)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[-4:-2])
    ctx.mark_non_differentiable(*output[4:])
    ctx.sizes = inputs[-2:]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return *_backward_op(*(x.contiguous() for x in grads[:4]), *ctx.saved_tensors, *ctx.sizes), None, None, None, None


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return *_slots_and_means(*grads, *ctx.saved_tensors, *ctx.sizes)[:4], None, None, None, None


# Both are linear, and each is the other's adjoint.
_slots_and_means.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_double_backward, setup_context=_save)
