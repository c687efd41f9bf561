"""Tokens to slots and back: gathers whose gradients are gathers too."""

from typing import Any

import torch
from torch import Tensor

from block_masks.checks import check_is, check_shape, check_tensor
from block_masks.launching.device import on_device
from block_masks.launching.transforms import in_transform
from block_masks.plans.slots import Slots, ValidSlots


def to_slots(x: Tensor, slots: Slots, valid: ValidSlots | None = None) -> Tensor:
    """Tokens in slots. Differentiable.

    Args:
        x: ``(B, H, keys, D)``.
        slots: of these keys.
        valid: which of each sample's keys are there; all if None.

    Returns:
        ``(B, H, slots, D)``, zero in padding slots and in slots of padding keys.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if ``x`` is not of as many keys.
    """
    check_is("slots", slots, Slots, "plan_slots")
    _check("x", x, len(slots.key_slot), "keys")
    if valid is not None:
        return _gather_slots(x, valid.slot_key(slots), valid.key_slot(slots))
    return x if slots.in_place else _gather_slots(x, slots.slot_key, slots.key_slot)


def from_slots(x: Tensor, slots: Slots) -> Tensor:
    """Slots ``(B, H, slots, D)`` as tokens ``(B, H, keys, D)`` again. Differentiable.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if ``x`` is not of as many slots.
    """
    check_is("slots", slots, Slots, "plan_slots")
    _check("x", x, len(slots.slot_key), "slots")
    return x if slots.in_place else _gather_slots(x, slots.key_slot, slots.slot_key)


def _check(name: str, x: Any, length: int, what: str) -> None:
    check_tensor(name, x, dims=("B", "H", what, "D"))
    check_shape(name, x, (*x.shape[:2], length, x.shape[3]), "slots")


def _gather_slots(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if in_transform(x):
        return take_slots(x.flatten(0, 1), index).unflatten(0, x.shape[:2])
    return _gather_op(x, index, inverse)


# The adjoint of a gather is the gather by the inverse index: no atomics.
@torch.library.custom_op("block_masks::gather_slots", mutates_args=())
def _gather_op(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return take_slots(x.flatten(0, 1), index).unflatten(0, x.shape[:2])


@_gather_op.register_kernel("cuda")
@on_device
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    from block_masks.plans import move_kernels

    return move_kernels.take_slots(x.flatten(0, 1).contiguous(), index).unflatten(0, x.shape[:2])


@_gather_op.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], index.shape[-1], x.shape[3])


def _save_slots(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_slots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return _gather_slots(grad, inverse, index), None, None


_gather_op.register_autograd(_gather_slots_backward, setup_context=_save_slots)


def take_slots(source: Tensor, index: Tensor, repeats: int = 1) -> Tensor:
    """Reorders the tokens of each head, and adds up ``repeats`` neighbouring heads.

    Args:
        source: ``(heads * repeats, length, D)``.
        index: int64 ``(places,)`` or, for as many heads each, ``(rows, places)``; -1 where the result is zero.
        repeats: neighbouring heads to add up, in float32 at least.

    Returns:
        ``(heads, places, D)``.
    """
    of_head = index.view(-1, index.shape[-1]).repeat_interleave(len(source) // (index.numel() // index.shape[-1]), 0)
    of_head = of_head[..., None]
    taken = source.gather(1, of_head.clamp(min=0).expand(-1, -1, source.shape[-1]))
    taken = torch.where(of_head >= 0, taken, 0)
    exact = torch.promote_types(source.dtype, torch.float32)
    return taken.unflatten(0, (-1, repeats)).sum(1, dtype=exact).to(source.dtype)
