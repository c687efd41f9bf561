"""Query, key and a rule -> what the rule ranks: the one place that knows all gates.

B batch, H heads, S tokens, N blocks, D head dim.
"""

import torch
from torch import Tensor

from block_masks import Slots
from block_masks.launching.device import on_device
from block_masks.precision import accumulator
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Gate, Rule, Threshold
from vmoba_flex.selection.cell_gate import cell_gate
from vmoba_flex.selection.exact_gate import exact_gate
from vmoba_flex.selection.gate import block_means, gate, products
from vmoba_flex.selection.mass import block_mass, log_mass


def gate_scores(
    query: Tensor, key: Tensor, partition: BlockPartition, of: Gate, queries: Queries | None = None
) -> Tensor:
    """Scores of all blocks for each video query; no gradient flows through them.

    Args:
        query: ``(B, H, S, D)`` in raster order, with prefix and suffix.
        key: ``(B, key heads, S, D)``; query head h uses key head ``h // (H // key heads)``.
        partition: the blocks.
        of: which gate's.
        queries: those of ``query``; None for all.

    Returns:
        ``(B, H, video queries, N)``, float32, or float64 for float64 inputs; block by block in memory.
    """
    if of == "mean":
        return gate(query, key, partition, queries)
    if of == "exact":
        return exact_gate(query, key, partition, queries)
    return cell_gate(query, key, partition, of == "spread", queries)


def tile_scores(
    query_slots: Tensor, key: Tensor, partition: BlockPartition, of: Gate, slots: Slots, text: bool = True
) -> Tensor:
    """Scores of all blocks for each tile of queries: those of the mean query, or for "exact" of its queries' mean mass.

    A tile's mean query would not do for "exact": the mass that it has is not what its queries have.

    Args:
        query_slots: ``(B, H, slots, D)``, zero in padding slots.
        key: ``(B, key heads, S, D)`` in raster order.
        partition: the blocks.
        of: which gate's.
        slots: of these queries.
        text: whether the queries of prefix and suffix are among them, in the last tiles.

    Returns:
        ``(B, H, video tiles, N)``, float32, or float64 for float64 inputs.
    """
    text_tiles = -(-(partition.prefix + partition.suffix) // slots.tile_size) if text else 0
    tiles = len(slots.tile_group) - text_tiles
    if of == "exact":
        lse = exact_gate(query_slots, key, partition, Queries(0, 0, tiles * slots.tile_size, 0))
        return _mean_shares(lse, slots.slot_key[: lse.shape[2]] >= 0, slots.tile_size)
    sums = query_slots.unflatten(2, (-1, slots.tile_size)).sum(3, dtype=accumulator(query_slots))
    queries = (sums / slots.tile_keys[:, None])[:, :, :tiles]
    if of == "mean":
        return products(queries, block_means(key, partition))
    return cell_gate(queries, key, partition, of == "spread", Queries(0, 0, tiles, 0))


# Opaque to Inductor, as the gates are.
@torch.library.custom_op("vmoba_flex::mean_shares", mutates_args=())
@on_device
def _mean_shares(lse: Tensor, valid: Tensor, tile_size: int) -> Tensor:
    """The log of the mean over each tile's queries of their shares; ``lse``: ``(B, H, slots, N)``, a slot a query."""
    shares = (lse - lse.logsumexp(-1, keepdim=True)).masked_fill_(~valid[:, None], -torch.inf)
    counts = valid.unflatten(0, (-1, tile_size)).sum(1, dtype=lse.dtype)
    return (shares.unflatten(2, (-1, tile_size)).logsumexp(3) - counts.log()[:, None]).contiguous()


@_mean_shares.register_fake
def _(lse: Tensor, valid: Tensor, tile_size: int) -> Tensor:
    return lse.new_empty(*lse.shape[:2], lse.shape[2] // tile_size, lse.shape[3])


def ranked(scores: Tensor, partition: BlockPartition, rule: Rule, head_dim: int) -> Tensor:
    """What a rule ranks: its gate's scores, or the masses that they stand for."""
    if not isinstance(rule, Threshold) or rule.normalize != "softmax":
        return scores
    return block_mass(scores, partition, head_dim) if rule.gate == "mean" else log_mass(scores)
