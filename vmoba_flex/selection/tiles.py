"""One choice of blocks for the queries of a tile, made from their mean; see ``dispatch.shared`` for the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import Slots, to_slots
from vmoba_flex.groups import block_slots
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.scores import ranked, tile_scores
from vmoba_flex.selection.select import select


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
        part: the heads of the call on this rank; None for all.

    Returns:
        bool ``(B, H, tiles, G)``; prefix and suffix, if any, are the last group and the last tiles.
    """
    scores = tile_scores(query_slots, key, partition, rule.gate, slots)
    own = slots.tile_group[: scores.shape[2], None] == torch.arange(partition.num_blocks, device=key.device)
    chosen = select(ranked(scores, partition, rule, key.shape[-1]), own, rule, part)
    text_tiles = len(slots.tile_group) - scores.shape[2]
    return F.pad(chosen, (0, int(text_tiles > 0), 0, text_tiles), value=True)


def choose_by_tiles(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule) -> Tensor:
    """Chooses what the queries of each tile of the video attend.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        partition: the blocks.
        rule: chooses them.

    Returns:
        bool ``(B, H, video tiles, N)``.
    """
    slots = block_slots(partition, query.device)
    chosen = choose_tiles(to_slots(query.detach(), slots), key.detach(), partition, rule, slots)
    text_tiles = -(-(partition.prefix + partition.suffix) // slots.tile_size)
    return chosen[:, :, : chosen.shape[2] - text_tiles, : partition.num_blocks]
