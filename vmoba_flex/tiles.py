"""Attention that skips the tiles that no query of theirs wants."""

from torch import Tensor

from vmoba_flex.chunked import chunked_attention
from vmoba_flex.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.mask import key_groups, keys_there, selection_mask
from vmoba_flex.partition import BlockPartition


def tiles_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    partition: BlockPartition,
    scale: float | None,
    enable_gqa: bool,
    text_lengths: Tensor | None = None,
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
        text_lengths: int64 ``(B,)``, as in ``vmoba_attention``.

    Returns:
        ``(B, H, S, value dim)`` in raster order.
    """
    if not has_flex_kernel(query, key, value):
        live = keys_there(partition, text_lengths)
        return chunked_attention(query, key, value, *key_groups(selection, partition), scale, live)
    mask = selection_mask(selection, partition, "block", text_lengths=text_lengths)
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    output = compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return partition.to_raster_order(output)
