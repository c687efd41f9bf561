"""Attention that skips the tiles that no query of theirs wants."""

from torch import Tensor

from vmoba_flex.chunked import chunked_attention
from vmoba_flex.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.mask import key_groups, selection_mask
from vmoba_flex.partition import BlockPartition


def tiles_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    partition: BlockPartition,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """``flex_attention`` in block order, where neighbours agree most; where it has no kernel, a slower exact path.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video tokens, N)``.
        partition: the blocks.
        scale: ``1 / sqrt(D)`` if None.
        enable_gqa: whether key may have fewer heads.

    Returns:
        ``(B, H, S, value dim)`` in raster order.
    """
    if not has_flex_kernel(query, key, value):
        return chunked_attention(query, key, value, *key_groups(selection, partition), scale)
    mask = selection_mask(selection, partition, "block")
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    output = compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return partition.to_raster_order(output)
