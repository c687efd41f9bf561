"""How much is chosen at most, known on the host: by a rule, or read once from what was chosen."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from block_masks import RowBound
from block_masks.plans.rows import TILE
from vmoba_flex.checks import check_positive, check_share
from vmoba_flex.groups import group_sizes
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import pieces_of
from vmoba_flex.rules import Rule, TopK, among
from vmoba_flex.selection.bits import Choice, allowed


class Bounds(NamedTuple):
    """How much is chosen at most.

    Attributes:
        density: a bound on the chosen share of all pairs, also of those that a causal partition does not allow; for
            query tiles, over these.
        rows: of ``packed``; None without a bound.
        blocks: of any query, or query tile; None without a bound.
    """

    density: float = 1.0
    rows: RowBound | None = None
    blocks: int | None = None

    def rows_of(self, heads: int) -> RowBound | None:
        """That of the rows, for some of the heads."""
        return self.rows if self.rows is None or self.rows.heads == 1 else RowBound(self.rows.row_tiles, heads)

    @property
    def flat(self) -> tuple[float, list[int], int | None]:
        """As a file holds it; ``of_flat`` takes it back."""
        return self.density, [*(self.rows or ())], self.blocks

    @classmethod
    def of_flat(cls, flat: tuple[float, list[int], int | None]) -> Self:
        """Those that a file holds.

        Raises:
            TypeError: if one has a wrong type.
            ValueError: if one is out of range.
        """
        density, rows, blocks = flat
        for number in (*rows, *([] if blocks is None else [blocks])):
            check_positive("bounds", number)
        return cls(check_share("bounds", density), RowBound(*rows) if rows else None, blocks)


UNBOUNDED = Bounds()


def bounds_of(selected: Tensor, partition: BlockPartition, choice: Choice, rule: Rule | None) -> Bounds:
    """How much was chosen at most.

    Without a rule, or if it does not bound the rows of tokens, numbers are read from the device, but not in a graph.

    Args:
        selected: bool ``(B, H, R, N)``.
        partition: the blocks.
        choice: what chose.
        rule: by which it chose, if by one.

    Raises:
        ValueError: if a query attends no block, where this is read.
    """
    bounds = UNBOUNDED if rule is None else _allowed(rule, partition, selected.shape[1], choice)
    if (rule is None or (choice == "token" and bounds.rows is None)) and not torch.compiler.is_compiling():
        found = _read(selected, partition, choice)
        return found if rule is None else bounds._replace(rows=found.rows)
    return bounds


def _allowed(rule: Rule, partition: BlockPartition, heads: int, choice: Choice) -> Bounds:
    blocks = partition.num_blocks
    if partition.causal_frames is None:
        rows = row_bound(partition, rule, heads, heads) if choice == "token" else None
    else:
        rule, rows = among(rule, blocks), _causal_rows(rule, partition, heads) if choice == "token" else None
    most = rule.max_pairs(blocks, blocks) if rule.pool == "query" else None
    return Bounds(
        largest_density(rule, blocks), rows, None if most is None else min(blocks, max(1 + len(rule.always), most))
    )


def _causal_rows(rule: Rule, partition: BlockPartition, heads: int) -> RowBound | None:
    """A bound on the rows of all pieces together, and so of each."""
    bounds = [
        row_bound(past, among(rule, past.num_blocks), heads, heads, here, here.video)
        for past, here in pieces_of(partition, Queries.of(partition))
    ]
    of_pieces = [bound for bound in bounds if bound is not None]
    return RowBound(sum([bound.row_tiles for bound in of_pieces]), of_pieces[0].heads) if of_pieces else None


def row_bound(
    partition: BlockPartition, rule: Rule, all_heads: int, heads: int, queries: Queries | None = None,
    competing: int | None = None,
) -> RowBound | None:  # fmt: skip
    """A bound on the rows of ``heads`` heads of a sample that has ``all_heads``; None if the rule does not bound them.

    A pool that spans heads bounds its heads together: any one of them may hold nearly all pairs.

    Args:
        partition: the blocks, all of which may be chosen.
        rule: chooses them.
        all_heads: of a sample.
        heads: whose rows are bounded.
        queries: whose rows are bounded; None for all.
        competing: video queries of a head that compete, where a pool spans queries; None for all of the partition.
    """
    together = heads if rule.pool in ("block", "global") else 1
    tiles = max_row_tiles(partition, rule, all_heads, together, queries, competing)
    return None if tiles is None else RowBound(tiles, together)


def max_row_tiles(
    partition: BlockPartition, rule: Rule, all_heads: int, heads: int, queries: Queries | None = None,
    competing: int | None = None,
) -> int | None:  # fmt: skip
    """The most tiles of rows that the queries of ``heads`` of a sample's ``all_heads`` can need; None without a cap."""
    queries = queries or Queries.of(partition)
    tokens, blocks = competing or partition.num_video_tokens, partition.num_blocks
    always = len(rule.always)
    # Entries of a pool, pools, and own pairs and those of always, which a pool keeps even beyond its cap.
    entries, pools, own = {
        "query": (blocks, heads * queries.video, 1 + always),
        "head": (tokens * blocks, heads, tokens * (1 + always)),
        "block": (all_heads * tokens, blocks - always, max(group_sizes(partition)[:blocks]) * all_heads),
        "global": (all_heads * tokens * blocks, 1, all_heads * tokens * (1 + always)),
    }[rule.pool]
    cap = rule.max_pairs(entries, blocks)
    if cap is None:
        return None
    whole = always if rule.pool == "block" else 0  # pools whose pairs are all kept
    pairs = min(pools * max(cap, own) + whole * heads * queries.video, heads * queries.video * blocks)
    groups = blocks
    if partition.prefix + partition.suffix:
        groups += 1
        pairs += heads * (queries.video + (queries.before + queries.after) * groups)
    return (pairs + heads * groups * (TILE - 1)) // TILE


def largest_density(rule: Rule, num_blocks: int) -> float:
    """A bound on the density: the best pairs hold more of the scores than their share, and kept blocks come on top."""
    kept = min(1 + len(rule.always), num_blocks) / num_blocks
    if isinstance(rule, TopK):
        return max(kept, rule.blocks_per_query(num_blocks) / num_blocks)
    cap = 1.0 if rule.max_density is None else max(kept, rule.max_density)
    return min(rule.tau + kept, cap)


def _read(selected: Tensor, partition: BlockPartition, choice: Choice) -> Bounds:
    if selected.is_meta:
        return UNBOUNDED
    needed = torch.zeros((), dtype=torch.int64, device=selected.device)
    if choice == "token":
        selected = allowed(selected, partition)
        queries, text = selected.sum(2), partition.prefix + partition.suffix
        tiles = (queries + (text + TILE - 1)) // TILE
        needed = tiles.sum(2).max() + (-(-partition.num_tokens // TILE) if text else 0)
    of_each = selected.sum(3)
    numbers = torch.stack([needed, of_each.sum(), of_each.min(), of_each.max()])
    tiles, pairs, least, most = numbers.tolist()
    if not least:
        raise ValueError("selected must hold at least one block for each query, got a query without one")
    return Bounds(pairs / selected.numel(), RowBound.rounded(tiles) if choice == "token" else None, most)
