"""Exact masked attention in plain PyTorch, for training on a CPU, where FlexAttention has no backward."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_masks import RowPlan

# Scores held at a time, over samples, heads, queries of the chunk and keys: 256 MiB in float32.
_CHUNK_SCORES = 2**26


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, key_group: Tensor, scale: float | None
) -> Tensor:
    """Attention of each query over the keys of its selected groups, a chunk of queries at a time.

    Costs as much as full attention. Backward recomputes each chunk, so that memory grows linearly with the tokens.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selected: bool ``(B, H, S, G)``.
        key_group: int64 ``(S,)``.
        scale: ``1 / sqrt(D)`` if None.

    Returns:
        ``(B, H, S, value dim)``, in query's dtype; accumulated in float32, or float64 for float64 inputs.
    """
    batch, heads, tokens, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    rows = max(1, _CHUNK_SCORES // (batch * heads * tokens))
    chunks = [
        checkpoint(_masked_attention, q, key, value, chosen, key_group, scale, use_reentrant=False)
        for q, chosen in zip(query.split(rows, 2), selected.split(rows, 2), strict=True)
    ]
    return torch.cat(chunks, dim=2)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, key_group: Tensor, scale: float
) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(exact) @ key.to(exact).mT) * scale
        scores = scores.masked_fill(~selected[..., key_group], -torch.inf)
        return (scores.softmax(-1) @ value.to(exact)).to(query.dtype)


def row_attention(rows: Tensor, keys: Tensor, values: Tensor, plan: RowPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of packed rows over their group's slots, tile by tile, as ``flex_attention`` does it on a GPU.

    Args:
        rows: ``(rows, D)``.
        keys: ``(H * slots, D)``.
        values: ``(H * slots, value dim)``.
        plan: of these rows and slots.
        scale: factor on the scores.

    Returns:
        The output ``(rows, value dim)`` in ``rows``'s dtype and the log-sum-exp of the scores ``(rows,)``; rows of
        unused tiles hold anything.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    mask = plan.block_mask
    assert mask.full_kv_indices is not None  # plan_rows makes all lists
    assert mask.full_kv_num_blocks is not None
    tile_size, _ = mask.BLOCK_SIZE
    tiles = torch.cat([mask.kv_indices, mask.full_kv_indices], -1)[0, 0]
    place = torch.arange(mask.kv_indices.shape[-1], device=rows.device)
    listed = torch.cat([place < count[0, 0, :, None] for count in (mask.kv_num_blocks, mask.full_kv_num_blocks)], -1)
    in_group = plan.slot_group.view(-1, tile_size)[tiles] == plan.row_group[:, None, None]
    # Unused tiles see whatever is listed first, for their scores must be finite: nothing reads them, but a gradient of
    # zero times infinity would be NaN.
    seen = ((in_group & listed[..., None]) | (plan.row_group == -2)[:, None, None]).flatten(1)[:, None]
    row_tiles, key_tiles, value_tiles = (x.to(exact).unflatten(0, (-1, tile_size)) for x in (rows, keys, values))
    with torch.autocast(rows.device.type, enabled=False):
        scores = row_tiles @ key_tiles[tiles].flatten(1, 2).mT * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        output = scores.softmax(-1) @ value_tiles[tiles].flatten(1, 2)
    return output.to(rows.dtype).flatten(0, 1), scores.logsumexp(-1).flatten()
