"""A selection -> FlexAttention that skips each tile that none of its queries wants."""

import torch
from torch import Tensor

from block_masks import group_mask, merge_coarse_keys, realize
from vmoba_flex.call import Call
from vmoba_flex.cells import coarse_keys
from vmoba_flex.dispatch.chunked import chunked_attention
from vmoba_flex.dispatch.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.groups import key_groups, valid_keys
from vmoba_flex.inputs import scale_of
from vmoba_flex.part import Queries


def tiles_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    call: Call,
    queries: Queries | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``flex_attention`` in block order, in which neighbours agree most; without a kernel for it, a slower exact path.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video queries, N)``.
        call: what they attend.
        queries: which ``query`` holds; None for all.

    Returns:
        ``(B, H, queries, value dim)`` in raster order, and the log-sum-exp ``(B, H, queries)`` if the call wants it.
    """
    partition = call.partition
    valid, wants_lse = valid_keys(partition, call.text_lengths), call.lse or call.tail is not None
    coarse = None if call.tail is None else coarse_keys(key, value, partition, call.tail)
    selected, groups = key_groups(selection, partition, queries)
    in_blocks = False
    if not has_flex_kernel(query, key, value, wants_lse):
        output, lse = chunked_attention(query, key, value, selected, groups, call.scale, valid, wants_lse)
    else:
        key, value = partition.to_block_order(key), partition.to_block_order(value)
        groups = partition.to_block_order(groups, dim=0)
        in_blocks = queries is None  # else a stretch of raster order, in which a block's queries are not neighbours
        if not in_blocks and not query.is_cuda:  # FlexAttention's CPU kernel cannot read views
            query = realize(query)
        if in_blocks:
            query, selected = partition.to_block_order(query), partition.to_block_order(selected)
        mask = group_mask(selected, groups, key_valid=valid)
        output, lse = compiled_flex_attention(
            query, key, value, block_mask=mask, scale=call.scale, enable_gqa=call.enable_gqa, lse=wants_lse
        )
    if coarse is not None:
        assert lse is not None
        output, lse = merge_coarse_keys(query, output, lse, coarse, selected, scale_of(call.scale, query))
    if not in_blocks:
        return output, lse
    return partition.to_raster_order(output), None if lse is None else partition.to_raster_order(lse, dim=-1)


def attend_all(
    query: Tensor, key: Tensor, value: Tensor, call: Call, valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Full attention with its log-sum-exp, which ``scaled_dot_product_attention`` does not give.

    Args:
        query: ``(B, H, queries, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        call: its scale.
        valid: bool ``(B, S)``, the keys that are attended; all if None.

    Returns:
        ``(B, H, queries, value dim)`` and ``(B, H, queries)``.
    """
    chosen = query.new_ones((*query.shape[:3], 1), dtype=torch.bool)
    group = torch.zeros(key.shape[2], dtype=torch.int64, device=key.device)
    if not has_flex_kernel(query, key, value, lse=True):
        return chunked_attention(query, key, value, chosen, group, call.scale, valid, lse=True)
    mask = None if valid is None else group_mask(chosen, group, key_valid=valid)
    return compiled_flex_attention(
        query, key, value, block_mask=mask, scale=call.scale, enable_gqa=call.enable_gqa, lse=True
    )
