"""One choice of blocks for the queries of a tile, made from their mean; see ``dispatch.shared`` for the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks import Slots, to_slots
from block_masks.plans.rows import TILE
from vmoba_flex.groups import block_slots, first_block, query_slots
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import pieces_of
from vmoba_flex.rules import Rule, among
from vmoba_flex.selection.scores import ranked, tile_scores
from vmoba_flex.selection.select import select


@torch.no_grad()
def choose_tiles(
    of_slots: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, slots: Slots, part: Part | None = None,
    queries: Queries | None = None,
) -> Tensor:  # fmt: skip
    """Chooses what the queries of each tile attend.

    Args:
        of_slots: queries ``(B, H, slots, D)``, zero in padding slots.
        key: ``(B, key heads, S, D)`` in raster order.
        partition: the blocks.
        rule: chooses them.
        slots: of the queries.
        part: the heads of the call on this rank; None for all.
        queries: which these are, if the slots are those of ``query_slots``; None for all.

    Returns:
        bool ``(B, H, tiles, G)``; prefix and suffix, if any, are the last group, and the last tiles of all queries.
    """
    (chosen,) = _choose(of_slots, key, partition, (rule,), slots, part, queries)
    text_tiles = len(slots.tile_group) - chosen.shape[2]
    return F.pad(chosen, (0, int(partition.prefix + partition.suffix > 0), 0, text_tiles), value=True)


def choose_by_tiles(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, tile_size: int = TILE) -> Tensor:
    """Chooses what the queries of each tile of the video attend.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        partition: the blocks.
        rule: chooses them.
        tile_size: queries in a tile.

    Returns:
        bool ``(B, H, video tiles, N)``.
    """
    return choose_tiles_by_each(query, key, partition, (rule,), tile_size)[0]


@torch.no_grad()
def choose_tiles_by_each(
    query: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], tile_size: int = TILE
) -> list[Tensor]:
    """``choose_by_tiles`` for rules of one gate, which scores the blocks once."""
    if partition.causal_frames is None:
        slots = block_slots(partition, query.device, tile_size)
        return _choose(to_slots(query, slots), key, partition, rules, slots)
    of_pieces = []  # the tiles of a chunk stand together, since its blocks do
    for piece in pieces_of(partition, Queries.of(partition)):
        past, here = piece.partition, piece.queries
        slots = query_slots(past, here, query.device, tile_size)
        own = to_slots(query.narrow(2, partition.prefix + here.first, here.video), slots)
        rules_of_past = tuple([among(rule, past.num_blocks) for rule in rules])
        chosen = _choose(own, piece.keys(key), past, rules_of_past, slots, queries=here)
        of_pieces.append([F.pad(x, (0, partition.num_blocks - past.num_blocks)) for x in chosen])
    return [torch.cat(of_rule, 2) for of_rule in zip(*of_pieces, strict=True)]


def _choose(
    of_slots: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], slots: Slots,
    part: Part | None = None, queries: Queries | None = None,
) -> list[Tensor]:  # fmt: skip
    """What each tile of the video attends by each rule, bool ``(B, H, video tiles, N)``."""
    scores = tile_scores(of_slots, key, partition, rules[0].gate, slots, queries is None)
    of_tile = slots.tile_group[: scores.shape[2], None]
    if queries is not None:
        of_tile = of_tile + first_block(partition, queries)
    own = of_tile == torch.arange(partition.num_blocks, device=key.device)
    return [select(ranked(scores, partition, rule, key.shape[-1]), own, rule, part) for rule in rules]
