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
    (chosen,) = _choose(query_slots, key, partition, (rule,), slots, part)
    text_tiles = len(slots.tile_group) - chosen.shape[2]
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
    return choose_tiles_by_each(query, key, partition, (rule,))[0]


@torch.no_grad()
def choose_tiles_by_each(
    query: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...]
) -> list[Tensor]:
    """``choose_by_tiles`` for rules of one gate, which scores the blocks once."""
    slots = block_slots(partition, query.device)
    return _choose(to_slots(query, slots), key, partition, rules, slots)


def _choose(
    query_slots: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], slots: Slots,
    part: Part | None = None,
) -> list[Tensor]:  # fmt: skip
    """What each tile of the video attends by each rule, bool ``(B, H, video tiles, N)``."""
    scores = tile_scores(query_slots, key, partition, rules[0].gate, slots)
    own = slots.tile_group[: scores.shape[2], None] == torch.arange(partition.num_blocks, device=key.device)
    return [select(ranked(scores, partition, rule, key.shape[-1]), own, rule, part) for rule in rules]
