"""Attention in which the queries of a tile share one choice of blocks: an approximation of per-token VMoBA.

FlexAttention runs or skips whole tiles. Where all queries of a tile attend the same blocks, each tile that runs was
chosen as a whole: the cost is the density, with no row per pair as in ``packed``. Blocks are padded to whole tiles, so
that tiles are full; blocks much smaller than a tile would mostly hold padding.

Definition. Each block's tokens, in raster order, are cut into *query tiles* of 128; the last one of a block may be
shorter. A query tile is one query: its vector is the mean of its tokens' queries, taken in float32 (float64 for float64
inputs), and its own block the one that it lies in. The rule chooses blocks for these queries as it does for tokens:
their number takes the place of the video tokens' in every pool, and a short tile counts as much as a full one. All
queries of a tile attend the blocks chosen for it, and prefix and suffix; prefix and suffix queries attend everything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import Slots, attend_slots, from_slots, realize, slot_mask, to_slots, valid_slots
from block_masks.plans.rows import TILE
from vmoba_flex.call import Call, ChosenBackend
from vmoba_flex.dispatch.chunked import chunked_attention
from vmoba_flex.dispatch.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.groups import block_slots, group_of_key, valid_group_lengths, valid_keys
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.gate import block_means, products
from vmoba_flex.selection.select import ranked, select


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    backend: ChosenBackend = "eager",
    tile_size: int = TILE,
    part: Part | None = None,
) -> tuple[Tensor, Tensor, Slots]:
    """Chooses blocks for each query tile and attends them, in block order with each block padded to whole tiles.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        call: what they attend.
        backend: ``"flash"`` for FlashAttention-4, where key has query's heads; anything else for FlexAttention's own
            kernels.
        tile_size: tokens in a query tile. Compiled kernels on Hopper GPUs need a multiple of 128.
        part: the heads of the call that lie here; None for all.

    Returns:
        The output ``(B, H, S, value dim)`` in raster order; what each tile attends, bool ``(B, H, tiles, G)``, where
        prefix and suffix are one more group behind the N blocks, and their tiles stand behind the video's; and the
        slots of these tiles.
    """
    partition, scale, text_lengths = call.partition, call.scale, call.text_lengths
    slots = block_slots(partition, query.device, tile_size)
    query_slots = to_slots(query, slots)
    selected = choose_tiles(query_slots, key, partition, call.rule, slots, part)
    if not has_flex_kernel(query, key, value):
        of_token = selected.index_select(2, slots.key_slot // tile_size)
        key_group = group_of_key(partition, query.device)
        live = valid_keys(partition, text_lengths)
        return chunked_attention(query, key, value, of_token, key_group, scale, live), selected, slots
    group_lengths, valid = None, None
    if backend == "flash" and text_lengths is not None:
        group_lengths = valid_group_lengths(partition, text_lengths)
        valid = slots.valid(group_lengths)
    q, k, v = query_slots, to_slots(key, slots, valid), to_slots(value, slots, valid)
    if not query.is_cuda:  # FlexAttention's kernel for CPUs reads no views of what an op made.
        q, k, v = map(realize, (q, k, v))
    if backend == "flash":
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        output, _ = attend_slots(q, k, v, selected, slots, scale, group_lengths)
        return from_slots(output, slots), selected, slots
    mask = slot_mask(selected, slots, valid_slots(slots, valid_keys(partition, text_lengths)))
    output = compiled_flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=call.enable_gqa)
    return from_slots(output, slots), selected, slots


@torch.no_grad()
def choose_tiles(
    query_slots: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, slots: Slots, part: Part | None = None
) -> Tensor:
    """Chooses what the queries of each tile attend.

    Args:
        query_slots: ``(B, H, slots, D)``, zero in padding slots.
        key: ``(B, key heads, S, D)`` in raster order.
        partition: the blocks.
        rule: chooses them.
        slots: of this partition.
        part: the heads of the call that lie here; None for all.

    Returns:
        bool ``(B, H, tiles, G)``; prefix and suffix, if any, are the last group and the last tiles.
    """
    means = block_means(key, partition)
    sums = query_slots.unflatten(2, (-1, slots.tile_size)).sum(3, dtype=means.dtype)
    text_tiles = -(-(partition.prefix + partition.suffix) // slots.tile_size)
    video_tiles = len(slots.tile_group) - text_tiles
    queries = (sums / slots.tile_keys[:, None])[:, :, :video_tiles]
    own = slots.tile_group[:video_tiles, None] == torch.arange(partition.num_blocks, device=key.device)
    chosen = select(ranked(products(queries, means), partition, rule, key.shape[-1]), own, rule, part)
    return F.pad(chosen, (0, int(text_tiles > 0), 0, text_tiles), value=True)
