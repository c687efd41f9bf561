"""A selection -> attention with a row for each pair: the cost is the density, even if neighbouring queries disagree."""

import torch
from torch import Tensor

from block_masks import RowBound, attend_packed
from block_masks.plans.rows import TILE
from vmoba_flex.call import Call, ChosenBackend
from vmoba_flex.cell_slots import slots_and_cells
from vmoba_flex.groups import block_slots, group_sizes, valid_group_lengths, with_text
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    call: Call,
    backend: ChosenBackend,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a row per (query, chosen block), a few heads at a time; see ``block_masks.attend_packed``.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video queries, N)``, made by the call's rule.
        call: what they attend. Its rule bounds the rows; for a ``Threshold`` without ``max_density``, which does not,
            one number is read from the device. At least one head is worked on at a time.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        part: the part of the call on this rank; None for all.

    Returns:
        The output ``(B, H, queries, value dim)`` and the log-sum-exp ``(B, H, queries)``.

    Raises:
        ValueError: inside ``torch.compile``, if the rule does not bound the rows.
    """
    partition = call.partition
    queries = Queries.of(partition) if part is None else part.queries
    heads = query.shape[1]
    all_heads = part.size if part is not None and part.dim == 1 else heads
    bound = row_bound(partition, call.rule, all_heads, heads, queries)
    if bound is None and torch.compiler.is_compiling():
        raise ValueError(
            "rule must bound its pairs for dispatch='packed' inside torch.compile: give Threshold a max_density, "
            "or use TopK"
        )
    lengths = None if call.text_lengths is None else valid_group_lengths(partition, call.text_lengths)
    slots, coarse = block_slots(partition, query.device), None
    if call.tail is not None:
        key, value, coarse = slots_and_cells(key, value, partition, call.tail, slots)
        slots = slots.placed
    return attend_packed(
        query, key, value, with_text(selection, partition, queries), slots,
        scale=call.scale, backend=backend, bound=bound, max_row_bytes=call.max_row_bytes, group_lengths=lengths,
        coarse=coarse,
    )  # fmt: skip


def row_bound(
    partition: BlockPartition, rule: Rule, all_heads: int, heads: int, queries: Queries | None = None
) -> RowBound | None:
    """A bound on the rows of ``heads`` heads of a sample that has ``all_heads``; None if the rule does not bound them.

    A pool that spans heads bounds its heads together: any one of them may hold nearly all pairs.
    """
    together = heads if rule.pool in ("block", "global") else 1
    tiles = max_row_tiles(partition, rule, all_heads, together, queries)
    return None if tiles is None else RowBound(tiles, together)


def max_row_tiles(
    partition: BlockPartition, rule: Rule, all_heads: int, heads: int, queries: Queries | None = None
) -> int | None:
    """The most tiles of rows that the queries of ``heads`` of a sample's ``all_heads`` can need; None without a cap."""
    queries = queries or Queries.of(partition)
    tokens, blocks = partition.num_video_tokens, partition.num_blocks
    # Entries of a pool, pools, and own pairs, which a pool keeps even beyond its cap.
    entries, pools, own = {
        "query": (blocks, heads * queries.video, 1),
        "head": (tokens * blocks, heads, tokens),
        "block": (all_heads * tokens, blocks, max(group_sizes(partition)[:blocks]) * all_heads),
        "global": (all_heads * tokens * blocks, 1, all_heads * tokens),
    }[rule.pool]
    cap = rule.max_pairs(entries, blocks)
    if cap is None:
        return None
    pairs = min(pools * max(cap, own), heads * queries.video * blocks)
    groups = blocks
    if partition.prefix + partition.suffix:
        groups += 1
        pairs += heads * (queries.video + (queries.before + queries.after) * groups)
    return (pairs + heads * groups * (TILE - 1)) // TILE
