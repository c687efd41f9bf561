"""A rule -> how much it can choose, known on the host: rows of ``packed``, and a bound on the density."""

from block_masks import RowBound
from block_masks.plans.rows import TILE
from vmoba_flex.groups import group_sizes
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, TopK


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


def largest_density(rule: Rule, num_blocks: int) -> float:
    """A bound on the density: the best pairs hold more of the scores than their share, and own blocks come on top."""
    if isinstance(rule, TopK):
        return rule.blocks_per_query(num_blocks) / num_blocks
    return min(rule.tau + 1 / num_blocks, rule.max_density or 1.0)
