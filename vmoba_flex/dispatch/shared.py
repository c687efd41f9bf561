"""Attention in which the queries of a tile share one choice of blocks: an approximation of per-token VMoBA.

FlexAttention runs or skips whole tiles. If all queries of a tile attend the same blocks, no tile runs in part: the cost
is the density, without the rows of ``packed``. Blocks are padded to whole tiles, so that tiles are full; blocks much
smaller than a tile are mostly padding.

Definition. Each block's tokens, in raster order, are split into *query tiles* of 128; the last one of a block may be
shorter. A query tile chooses as one query. Its vector is the mean of its tokens' queries, in float32 (float64 for
float64 inputs), and its own block is the one that holds it. In every pool, query tiles take the place of video tokens,
and a short tile counts as much as a full one. All queries of a tile attend the blocks chosen for it, and prefix and
suffix; prefix and suffix queries attend everything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from block_masks import Slots, attend_slots, from_slots, merge_coarse_keys, realize, slot_mask, to_slots, valid_slots
from block_masks.plans.rows import TILE
from vmoba_flex.call import Call, ChosenBackend
from vmoba_flex.cell_slots import slots_and_cells
from vmoba_flex.cells import coarse_keys
from vmoba_flex.dispatch.chunked import chunked_attention
from vmoba_flex.dispatch.compiled import compiled_flex_attention, has_flex_kernel
from vmoba_flex.groups import block_slots, group_of_key, query_slots, valid_group_lengths, valid_keys
from vmoba_flex.inputs import scale_of
from vmoba_flex.part import Part
from vmoba_flex.selection.kept import Selection
from vmoba_flex.selection.plan import log_planned_again, plan_of_call
from vmoba_flex.selection.tiles import choose_tiles


class Shared(NamedTuple):
    """Attention of tiles that share a choice.

    Attributes:
        output: ``(B, H, S, value dim)`` in raster order.
        lse: ``(B, H, S)``, its natural log-sum-exp, if the call wants it.
        selected: bool ``(B, H, tiles, G)``, what each tile attends. Prefix and suffix are one more group after the N
            blocks, and their tiles follow the video's.
        slots: of these tiles of queries.
    """

    output: Tensor
    lse: Tensor | None
    selected: Tensor
    slots: Slots


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    backend: ChosenBackend = "eager",
    tile_size: int = TILE,
    part: Part | None = None,
) -> Shared:
    """Chooses blocks for each query tile and attends them, in block order with each block padded to whole tiles.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        call: what they attend.
        backend: ``"flash"`` for FlashAttention-4, where key has query's heads; anything else for FlexAttention's own
            kernels.
        tile_size: tokens in a query tile. Compiled kernels on Hopper GPUs need a multiple of 128.
        part: the heads of the call on this rank; None for all.
    """
    partition, scale, text_lengths, queries = call.partition, call.scale, call.text_lengths, call.queries
    rule, plan = call.rule, None
    if isinstance(rule, Selection):
        plan = plan_of_call(rule.plan, text_lengths, part)
    slots = block_slots(partition, query.device, tile_size) if plan is None else plan.slots
    own_slots = slots if queries is None else query_slots(partition, queries, query.device, tile_size)
    q = to_slots(query, own_slots)
    if isinstance(rule, Selection):
        selected = rule.tiles(part) if plan is None or plan.of_tiles is None else plan.of_tiles
    else:
        selected = choose_tiles(q, key, partition, rule, own_slots, part, queries)
    wants_lse = call.lse or call.tail is not None
    if not has_flex_kernel(query, key, value, wants_lse):
        of_token = selected.index_select(2, own_slots.key_slot // tile_size)
        key_group, valid = group_of_key(partition, query.device), valid_keys(partition, text_lengths)
        output, lse = chunked_attention(query, key, value, of_token, key_group, scale, valid, wants_lse)
        if call.tail is not None:
            assert lse is not None
            coarse = coarse_keys(key, value, partition, call.tail)
            output, lse = merge_coarse_keys(query, output, lse, coarse, of_token, scale_of(scale, query))
        return Shared(output, lse, selected, own_slots)
    group_lengths, valid = None, None
    if backend == "flash" and text_lengths is not None:
        group_lengths = valid_group_lengths(partition, text_lengths)
        valid = slots.valid(group_lengths)
    coarse = None
    if call.tail is None:
        k, v = to_slots(key, slots, valid), to_slots(value, slots, valid)
    else:
        k, v, coarse = slots_and_cells(key, value, partition, call.tail, slots, valid)
    if not query.is_cuda:  # FlexAttention's CPU kernel cannot read views of an op's result
        q, k, v = map(realize, (q, k, v))
    tiles, lists = (None, None) if plan is None else (plan.tiles, plan.lists)
    if plan is not None and (lists if backend == "flash" else tiles) is None and not torch.compiler.is_compiling():
        log_planned_again(f"it was not made for backend={backend!r}")
    if backend == "flash":
        output, lse = attend_slots(q, k, v, selected, slots, scale_of(scale, query), group_lengths, coarse, lists)
    else:
        of_samples = valid_slots(slots, valid_keys(partition, text_lengths))
        mask = slot_mask(selected, slots, of_samples, tiles, len(own_slots.slot_key))
        output, lse = compiled_flex_attention(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=call.enable_gqa, lse=wants_lse
        )
        if coarse is not None:
            assert lse is not None
            output, lse = merge_coarse_keys(q, output, lse, coarse, selected, scale_of(scale, query), tile_size)
    if lse is not None and call.lse:
        lse = from_slots(lse[..., None], own_slots)[..., 0]
    return Shared(from_slots(output, own_slots), lse if call.lse else None, selected, own_slots)
