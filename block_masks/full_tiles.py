"""Attention over a ``BlockMask`` without cut tiles, by FlashAttention-4: a registered op, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from block_masks.device import on_device


def attend_full_tiles(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Attention of each tile of queries over its full tiles of keys, where ``flash_kernels.refusal`` has no objection.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, H, keys, D)``.
        value: ``(B, H, keys, value dim)``.
        block_mask: ``(B, H, S, keys)``, in tiles of 128 x 128 of which none is cut; its ``mask_mod`` is not read.
        scale: factor on the scores.

    Returns:
        ``(B, H, S, value dim)``. Its gradient of query is summed by atomics: two runs may differ in the last bits.
    """
    mask = block_mask
    lists = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    transposed = [mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices]
    output, _ = _attend(query, key, value, lists, transposed, scale)
    return output


@torch.library.custom_op("block_masks::attend_full_tiles", mutates_args=())
@on_device
def _attend(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], transposed: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    from block_masks import flash_kernels

    return flash_kernels.attend_tiles(query, key, value, lists, scale)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], value.shape[-1])
    return query.new_empty(shape), query.new_empty(shape[:3], dtype=torch.float32)


@torch.library.custom_op("block_masks::attend_full_tiles_backward", mutates_args=())
@on_device
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    transposed: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from block_masks import flash_kernels

    return flash_kernels.attend_tiles_backward(grad, query, key, value, output, lse, transposed, scale)


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[4])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[5]


def _backward_of_attend(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, a, b, c, d = ctx.saved_tensors
    return *_attend_backward(grad, *tensors, [a, b, c, d], ctx.scale), [None] * 4, [None] * 4, None


_attend.register_autograd(_backward_of_attend, setup_context=_save)
