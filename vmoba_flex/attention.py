"""The public attention call: checks, chooses blocks, dispatches."""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import Slots, slot_tile_map
from vmoba_flex.inputs import (
    check_choice,
    check_positive,
    check_query_key,
    check_scale,
    check_value,
    under_autocast,
)
from vmoba_flex.mask import selection_tiles
from vmoba_flex.packed import packed_attention
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection import choose_blocks
from vmoba_flex.shared import shared_attention
from vmoba_flex.tiles import tiles_attention

DISPATCHES = ("auto", "tiles", "packed", "shared", "dense")
BACKENDS = ("auto", "triton")


class AttentionStats(NamedTuple):
    """What a call attended, per sample and head; tensors ``(B, H)`` on the inputs' device.

    Attributes:
        density: float32, ``pairs / (video tokens * N)``.
        tile_density: float32, the share of 128 x 128 tiles, in block order, with at least one attended pair: what the
            dispatch ``"tiles"`` runs. For ``"shared"``, the share of its own tiles that it runs: there each block, and
            prefix and suffix together, take whole tiles.
        pairs: int64, chosen (query, block) pairs; for ``"shared"``, a tile's choices count once for each of its tokens.
    """

    density: Tensor
    tile_density: Tensor
    pairs: Tensor


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: Literal[False] = False,
    max_row_bytes: int = 2**29,
) -> Tensor: ...


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: Literal[True],
    max_row_bytes: int = 2**29,
) -> tuple[Tensor, AttentionStats]: ...


def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: bool = False,
    max_row_bytes: int = 2**29,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """VMoBA attention (arXiv 2506.23858), raster order in and out, differentiable in query, key and value.

    Softmax attention of each video query over exactly the keys of the blocks that ``rule`` chose for it, and over
    prefix and suffix; prefix and suffix queries attend everything. Nothing is read back to the host, but for one number
    by ``"packed"`` where the rule does not bound its pairs.

    On a GPU the attention is compiled FlexAttention. On a CPU it is FlexAttention inside ``torch.compile`` without
    gradients, and otherwise a slower exact path that costs as much as full attention.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA. Under autocast all three are cast first.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.
        scale: factor on the scores before the softmax; ``1 / sqrt(D)`` by default. The choice of blocks ignores it.
        enable_gqa: allow fewer key heads than query heads; query head h uses key head ``h // (H // key heads)``.
        dispatch: ``"tiles"`` skips the tiles that no query of theirs wants. ``"packed"`` gathers the queries of each
            block, so that its cost is the density whatever neighbouring queries choose; see ``packed``. ``"shared"``
            is an approximation, and not what ``vmoba_selection`` chooses: up to 128 neighbouring queries of a block
            share one choice, made from their mean query, so that each tile that runs was chosen; see ``shared``.
            ``"dense"`` is full attention, which ignores ``rule``. ``"auto"`` is ``"tiles"``, and never ``"shared"``.
        backend: the kernels of FlexAttention on a GPU: ``"triton"``, or ``"auto"``, which is the same.
        return_stats: also return ``AttentionStats``.
        max_row_bytes: for ``"packed"``, the size of the queries gathered at a time, a few heads of them and at least
            one; about five times as much is held at the peak. Pools that span heads gather all heads at once.

    Returns:
        The output ``(B, H, S, value dim)``, or the output and ``AttentionStats``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.

    Example:
        >>> import torch
        >>> from vmoba_flex import BlockPartition, Threshold, vmoba_attention
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4))
        >>> out, stats = vmoba_attention(q, k, v, partition, Threshold(0.25), return_stats=True)
        >>> out.shape, stats.density.shape
        (torch.Size([1, 2, 256, 16]), torch.Size([1, 2]))
    """
    check_choice("dispatch", dispatch, DISPATCHES)
    check_choice("backend", backend, BACKENDS)
    query, key, value = under_autocast(query, key, value)
    check_query_key(query, key, partition, rule)
    check_value(value, query, key)
    check_scale(scale)
    check_positive("max_row_bytes", max_row_bytes)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} heads"
        )
    if backend == "triton" and not query.is_cuda:
        raise ValueError(f"backend must be 'auto' on device {query.device}, got 'triton'")
    if dispatch == "dense":
        output = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
        return (output, _dense_stats(query, partition)) if return_stats else output
    if dispatch == "shared":
        output, selected, slots = shared_attention(query, key, value, partition, rule, scale, enable_gqa)
        return (output, _shared_stats(selected, slots, partition)) if return_stats else output
    selection = choose_blocks(query, key, partition, rule)
    if dispatch == "packed":
        output = packed_attention(query, key, value, selection, partition, rule, scale, max_row_bytes)
    else:
        output = tiles_attention(query, key, value, selection, partition, scale, enable_gqa)
    return (output, _stats(selection, partition)) if return_stats else output


def _stats(selection: Tensor, partition: BlockPartition) -> AttentionStats:
    pairs = selection.sum((-2, -1))
    tiles = selection_tiles(selection, partition, "block").some
    return AttentionStats(pairs / selection[0, 0].numel(), tiles.float().mean((-2, -1)), pairs)


def _shared_stats(selected: Tensor, slots: Slots, partition: BlockPartition) -> AttentionStats:
    is_video = slots.tile_group < partition.num_blocks
    pairs = (selected[..., : partition.num_blocks].sum(-1) * (slots.tile_keys * is_video)).sum(-1)
    tiles = slot_tile_map(selected, slots).some
    density = pairs / (partition.num_video_tokens * partition.num_blocks)
    return AttentionStats(density, tiles.float().mean((-2, -1)), pairs)


def _dense_stats(query: Tensor, partition: BlockPartition) -> AttentionStats:
    ones = torch.ones(query.shape[:2], device=query.device)
    pairs = partition.num_video_tokens * partition.num_blocks
    return AttentionStats(ones, ones.clone(), torch.full_like(ones, pairs, dtype=torch.int64))
