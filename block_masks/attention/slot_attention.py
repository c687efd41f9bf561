"""Attention of tiles of slots over the groups that they chose, by kernels that know only whole tiles.

FlashAttention-4 runs tiles with a mask at a third of its speed. A group's last tile would need one, for the slots that
only pad it. It runs without a mask all the same:

Forward. A padding slot holds a copy of its group's last key, and a value of zero. So it adds nothing to the output, and
to a query's sum of ``exp(score)`` as much as that key does. What all of them add is known, and taken out again: the
output is divided by the share that is left, and the logarithm of it added to the log-sum-exp. At least one in
``tile_size`` of a group's part in the sum is a key's own, so at least that share is left.

A key that is not valid, such as padding of text, is treated alike: its slot is a padding slot. A group's padding slots
come after its valid keys, and tiles without a valid key are skipped.

Backward. With the output and log-sum-exp so corrected, ``p = exp(score - lse)`` is right for each key. A padding slot
holds a key of zeros here: it adds nothing to the gradient of query, and its own gradients are dropped. Its p is
``exp(-lse)``, which must stay finite.

``slot_steps.py`` has the steps in plain PyTorch, for a CPU; ``flash_kernels.py`` and ``padding_kernels.py`` for a GPU.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from block_masks.attention.coarse_steps import CoarseKeys, check_coarse_size
from block_masks.attention.packed_checks import check_choices, check_coarse, check_lengths, check_like_query
from block_masks.attention.plain import plain_slots
from block_masks.checks import check_finite, check_is, check_shape, check_tensor
from block_masks.launching.autograd import grad_of, save_of
from block_masks.launching.device import on_device
from block_masks.launching.transforms import in_transform
from block_masks.masks.slot_mask import check_slot_choice
from block_masks.masks.tile_map import tile_lists
from block_masks.plans.slots import SLOT_TENSORS, Slots, ValidSlots

_SLOTS = len(SLOT_TENSORS)  # first in the list of an op's plans, before lists of tiles


def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    slots: Slots,
    scale: float,
    group_lengths: Tensor | None = None,
    coarse: CoarseKeys | None = None,
    lists: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each tile of slots over the keys of the groups that it chose.

    On a GPU by FlashAttention-4, where ``flash_check.refusal`` has no objection; on a CPU by plain PyTorch that holds
    all scores at once, to test it.

    Args:
        query: ``(B, H, slots, D)``.
        key: ``(B, H, slots, D)``, zero in slots without a valid key, as ``to_slots`` leaves it.
        value: ``(B, H, slots, value dim)``, zero there too.
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends, at least one with a key.
        slots: of these tiles and groups.
        scale: factor on the scores.
        group_lengths: int32 ``(B, G)``: how many of each group's keys, the first ones, are valid; all if None.
        coarse: keys of the groups that a tile did not choose, ``B * H`` heads of them.
        lists: ``key_lists`` of the choice, if they are known. Not with ``group_lengths``, which change them.

    Returns:
        ``(B, H, slots, value dim)``, and the natural log-sum-exp ``(B, H, slots)``, float32 at least, without a
        gradient. Gradients of key and value mean nothing in padding slots. A GPU sums the gradient of query by atomics:
        two runs may differ in the last bits. Where all scores of a query lie below -80, and not all slots hold a key,
        gradients may not be finite.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes or devices do not fit; if the dtype is float16, in which ``exp(-lse)`` overflows, and a
            group is no whole number of tiles or ``group_lengths`` is given; if lists are given with these; on a
            GPU, if there are more coarse keys than kernels index.
    """
    check_like_query(query, {"key": key, "value": value})
    check_is("slots", slots, Slots, "plan_slots")
    shape = (*query.shape[:2], len(slots.slot_key))
    check_shape("query", query, (*shape, query.shape[3]), "slots")
    check_shape("key", key, tuple(query.shape), "query")
    check_shape("value", value, (*shape, value.shape[3]), "query")
    check_choices(selected, query, len(slots.tile_group), slots)
    check_finite("scale", scale)
    check_lengths(group_lengths, query, slots)
    check_coarse(coarse, query, query.shape[1], value.shape[3], selected.shape[3])
    if lists is not None:
        check_is("lists", lists, tuple, "key_lists, or None")
        for x in lists:
            check_tensor("lists", x, "int32")
    if lists is not None and group_lengths is not None:
        raise ValueError("lists must be None with group_lengths, which change what is attended, got tensors")
    if query.dtype == torch.float16 and not slots.whole:
        raise ValueError(f"query must not be float16 where groups are no whole tiles, got sizes {slots.group_sizes}")
    if query.dtype == torch.float16 and group_lengths is not None:
        raise ValueError("query must not be float16 with group_lengths, got torch.float16")
    if coarse is not None and query.is_cuda:
        check_coarse_size("coarse", query.shape[0] * query.shape[1], selected.shape[2], len(coarse.bias))
    if in_transform(query, key, value, *(coarse or ())):
        return plain_slots(query, key, value, selected, group_lengths, slots, scale, coarse)
    of_slots, *sizes = slots.flat
    return _attend(
        query, key, value, selected, group_lengths, *(coarse or [None] * 4), [*of_slots, *(lists or ())], *sizes, scale
    )


def key_lists(selected: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """The tiles of keys that each tile of slots attends, counted and listed; see ``tile_lists``.

    Args:
        selected: bool ``(B, H, tiles, G)``: which groups each tile of slots attends.
        slots: of these tiles and groups.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes do not fit.
    """
    check_slot_choice(selected, slots)
    return tile_lists(_key_tiles(selected, slots))


@torch.library.custom_op("block_masks::attend_slots", mutates_args=())
@on_device
def _attend(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    output, lse = _attend_chosen(query, key, value, selected, group_lengths, slots, plans[_SLOTS:], scale)
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    if coarse is None:
        return output, lse
    merged_lse = torch.empty_like(lse)
    flat = (x.flatten(0, 1) for x in (output, lse, output, merged_lse))
    rows, of_rows, *merged = flat
    _modules(query)[2].merge_coarse(
        query.flatten(0, 1).contiguous(), coarse, selected.flatten(0, 1), rows, of_rows, tuple(merged), scale, tile_size
    )
    return output, merged_lse


def _attend_chosen(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None, slots: Slots,
    known: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attend, padding, _ = _modules(query)
    tile_size = slots.tile_size
    if slots.whole and group_lengths is None:
        lists = _whole_tiles(known or tile_lists(_key_tiles(selected, slots)))
        return attend.attend_tiles(query, key, value, lists, scale, tile_size)
    valid = slots.valid(slots.group_lengths[None] if group_lengths is None else group_lengths)
    lists = _whole_tiles(known or tile_lists(_key_tiles(selected, slots, valid)))
    keys = key.flatten(0, 1).contiguous()
    copied = padding.take_slots(keys, valid.copied(slots)).view(key.shape)
    output, lse = attend.attend_tiles(query, copied, value, lists, scale, tile_size)
    last_keys = padding.take_slots(keys, valid.last).unflatten(0, key.shape[:2])
    padding_lse = padding.padding_lse(query, last_keys, valid.padding, selected, scale, tile_size)
    return output, padding.remove_padding(output, lse, padding_lse)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], value.shape[-1])
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape), query.new_empty(shape[:3], dtype=exact)


@torch.library.custom_op("block_masks::attend_slots_backward", mutates_args=())
@on_device
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    output: Tensor, lse: Tensor,
    plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    attend, _, tail = _modules(query)
    tiles = _key_tiles(selected, slots, None if group_lengths is None else slots.valid(group_lengths))
    lists = _whole_tiles(tile_lists(tiles.mT))
    grads = list(attend.attend_tiles_backward(grad, query, key, value, output, lse, lists, scale, tile_size))
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    if coarse is not None:
        grad, output = grad.contiguous(), output.contiguous()
        flat = [x.flatten(0, 1) for x in (grad, lse, attend.delta(grad, output), grads[0])]
        grads += tail.coarse_backward(
            query.flatten(0, 1).contiguous(), coarse, selected.flatten(0, 1), *flat, scale, tile_size
        )
    return grads


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> list[Tensor]:
    coarse = [x for x in others[2:4] if x is not None]
    return [x.new_empty(x.shape) for x in (query, key, value, *coarse)]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, group_lengths: Tensor | None,
    coarse_key: Tensor | None, coarse_value: Tensor | None, coarse_bias: Tensor | None, coarse_group: Tensor | None,
    plans: list[Tensor], group_sizes: list[int], tile_size: int, sorted_keys: bool, scale: float,
) -> Tensor:  # fmt: skip
    slots = Slots.of_flat(plans[:_SLOTS], group_sizes, tile_size, sorted_keys)
    coarse = CoarseKeys.given(coarse_key, coarse_value, coarse_bias, coarse_group)
    return plain_slots(query, key, value, selected, group_lengths, slots, scale, coarse)[0]


_attend.register_autograd(grad_of(_attend_backward, tensors=9, plain=_plain), setup_context=save_of(tensors=9))


def _key_tiles(selected: Tensor, slots: Slots, valid: ValidSlots | None = None) -> Tensor:
    """The tiles of keys that each tile of slots attends: bool ``(B, H, tiles, tiles)``."""
    tiles = selected.index_select(-1, slots.tile_group)
    return tiles if valid is None else tiles & valid.tiles[:, None, None]


def _whole_tiles(full: Sequence[Tensor]) -> list[Tensor]:
    """Counts and lists of partial tiles, of which there are none, and of the full ones, which are given."""
    counts, listed = full
    return [torch.zeros_like(counts), torch.zeros_like(listed), counts, listed]


def _modules(query: Tensor) -> tuple[ModuleType, ModuleType, ModuleType]:
    """What attends tiles, removes padding and merges coarse keys; Triton is imported on first use."""
    if not query.is_cuda:
        from block_masks.attention import coarse_steps, slot_steps

        return slot_steps, slot_steps, coarse_steps
    from block_masks.attention import coarse_kernels, flash_kernels, padding_kernels

    return flash_kernels, padding_kernels, coarse_kernels
