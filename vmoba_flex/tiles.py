"""Attention that skips the tiles that no query of theirs wants."""

import torch
from torch import Tensor

from vmoba_flex.chunked import chunked_attention
from vmoba_flex.compiled import compiled_flex_attention
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
    """``flex_attention`` in block order, where neighbours agree most.

    FlexAttention on a CPU has no backward and no float64, and pays for a compilation only inside a compiled caller;
    elsewhere a CPU takes a slower exact path.

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
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    compiling = torch.compiler.is_compiling() and query.dtype != torch.float64
    if query.device.type == "cpu" and (needs_grad or not compiling):
        return chunked_attention(query, key, value, *key_groups(selection, partition), scale)
    mask = selection_mask(selection, partition, "block")
    query, key, value = (partition.to_block_order(x) for x in (query, key, value))
    output = compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return partition.to_raster_order(output)
