"""Attention that skips the tiles that no query of theirs wants."""

from torch import Tensor

from block_masks import group_mask
from vmoba_flex.call import Call
from vmoba_flex.dispatch.chunked import chunked_attention
from vmoba_flex.dispatch.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.groups import key_groups, valid_keys
from vmoba_flex.mask import selection_mask
from vmoba_flex.part import Queries


def tiles_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    call: Call,
    queries: Queries | None = None,
) -> Tensor:
    """``flex_attention`` in block order, where neighbours agree most; where it has no kernel, a slower exact path.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video queries, N)``.
        call: what they attend.
        queries: which queries there are, where not all are.

    Returns:
        ``(B, H, queries, value dim)`` in raster order.
    """
    partition, scale, enable_gqa = call.partition, call.scale, call.enable_gqa
    live = valid_keys(partition, call.text_lengths)
    if not has_flex_kernel(query, key, value):
        return chunked_attention(query, key, value, *key_groups(selection, partition, queries), scale, live)
    if queries is not None:  # a stretch of raster order, in which a block's queries do not all stand together
        selected, groups = key_groups(selection, partition, queries)
        mask = group_mask(selected, partition.to_block_order(groups, dim=0), key_valid=live)
        key, value = partition.to_block_order(key), partition.to_block_order(value)
        return compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    mask = selection_mask(selection, partition, "block", text_lengths=call.text_lengths)
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    output = compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return partition.to_raster_order(output)
