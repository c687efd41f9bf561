"""Query, key, a partition and a rule -> the selection: one algorithm over pools, for both rules.

B batch, H heads, S video tokens, N blocks.
"""

import functools
import logging
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from block_masks.launching.device import on_device
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import pieces_of
from vmoba_flex.rules import Pool, Rule, TopK, among
from vmoba_flex.selection.scores import gate_scores, ranked
from vmoba_flex.selection.sorted_pools import take_sorted
from vmoba_flex.selection.weights import Targets
from vmoba_flex.warmup import WarmedThreshold, rule_of_flat

_LOG = logging.getLogger(__name__)

# The most blocks that the kernel for pools of one query takes.
SHORT = 4096

# For each pool, the dims of a (B, H, S, N) gate that stay apart and those that compete. The competing dims stand in
# the order that breaks ties: block id, then query index, then head.
POOL_DIMS = {
    "query": ([0, 1, 2], [3]),
    "block": ([0, 3], [2, 1]),
    "head": ([0, 1], [3, 2]),
    "global": ([0], [3, 2, 1]),
}


def choose_blocks(
    query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, part: Part | None = None,
    queries: Queries | None = None,
) -> Tensor:  # fmt: skip
    """Chooses the blocks of each query, of checked inputs, or of the part of a call on this rank.

    Args:
        query: ``(B, H, queries, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        partition: the blocks. In a causal one, queries choose among the blocks of their own chunk and those before it,
            and compete with queries of their chunk only.
        rule: chooses them.
        part: the part of the call on this rank; None for all.
        queries: those of ``query``; None for all, or those of ``part``.

    Returns:
        bool ``(B, H, video queries, N)`` in raster order; block by block in memory, so not contiguous.
    """
    return choose_by_each(query, key, partition, (rule,), part, queries)[0]


def choose_by_each(
    query: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], part: Part | None = None,
    queries: Queries | None = None,
) -> list[Tensor]:  # fmt: skip
    """``choose_blocks`` for rules of one gate, which scores the blocks once."""
    if part is not None:
        queries = part.queries
    if partition.causal_frames is None:
        return _choose(query, key, partition, rules, part, queries)
    queries, of_pieces = queries or Queries.of(partition), []
    for piece in pieces_of(partition, queries):
        past, here = piece.partition, piece.queries
        own = query.narrow(2, queries.before + here.first - queries.first, here.video)
        rules_of_past = tuple([among(rule, past.num_blocks) for rule in rules])
        chosen = _choose(own, piece.keys(key), past, rules_of_past, part, here)
        of_pieces.append([F.pad(x.mT, (0, 0, 0, partition.num_blocks - past.num_blocks)) for x in chosen])
    return [torch.cat(of_rule, -1).mT for of_rule in zip(*of_pieces, strict=True)]


def _choose(
    query: Tensor, key: Tensor, partition: BlockPartition, rules: tuple[Rule, ...], part: Part | None,
    queries: Queries | None,
) -> list[Tensor]:  # fmt: skip
    """``choose_by_each`` among all blocks."""
    ids = partition.block_ids(query.device)
    if queries is not None:
        ids = ids[queries.first : queries.first + queries.video]
    own = (torch.arange(partition.num_blocks, device=query.device)[:, None] == ids).mT
    scores = gate_scores(query, key, partition, rules[0].gate, queries)
    return [select(ranked(scores, partition, rule, query.shape[-1]), own, rule, part) for rule in rules]


def select(scores: Tensor, own: Tensor, rule: Rule, part: Part | None = None) -> Tensor:
    """Applies a rule to what it ranks.

    Args:
        scores: floating ``(B, H, S, N)``; masses in 0..1, or NaN, for a ``Threshold`` with ``normalize="softmax"``.
        own: bool ``(S, N)``, True at each query's own block; blocks of ``rule.always`` count as own for all.
        rule: ``TopK`` or ``Threshold``.
        part: the part of a call that these scores are; None for all. If its heads or queries compete with other ranks',
            all ranks of its group call this, and the choice equals a single process's, to the bit.

    Returns:
        bool ``(B, H, S, N)``, the transpose of a contiguous ``(B, H, N, S)``.
    """
    if part is None or part.dim not in POOL_DIMS[rule.pool][1]:
        return _select(scores, own, *rule.flat)
    return _select_across(scores, own, part.places, part.dim, part.size, *rule.flat, part.group)


# Opaque to Inductor, which on torch 2.11 fails to fuse scans as long as a pool with what surrounds them, and which
# could otherwise compute a selection twice, rounding the gate differently for the tile lists and for the words.
@torch.library.custom_op("vmoba_flex::select", mutates_args=())
@on_device
def _select(
    scores: Tensor, own: Tensor, words: str, counts: list[int], shares: list[float], now: Tensor | None
) -> Tensor:
    rule = rule_of_flat(words, counts, shares, now)
    own = _with_always(own, rule)
    apart, competing = POOL_DIMS[rule.pool]
    targets = _targets(rule, scores, math.prod([scores.shape[dim] for dim in competing]))
    search = _search(scores, rule.pool)
    if search == "short":
        from vmoba_flex.selection.short_pool_kernels import take_short

        batch, heads, tokens, blocks = scores.shape
        return take_short(scores.flatten(0, 1), own, targets).view(batch, heads, blocks, tokens).mT
    pools, own = _pools(scores, own, apart, competing)
    if search == "long":
        from vmoba_flex.selection.long_pool_kernels import take_long

        taken = take_long(pools.contiguous(), own, targets)
    else:
        taken = take_sorted(pools, own, targets)
    return _unpooled(taken, scores, apart, competing)


# Opaque too, with its collectives inside.
@torch.library.custom_op("vmoba_flex::select_across", mutates_args=())
@on_device
def _select_across(
    scores: Tensor, own: Tensor, places: Tensor, dim: int, size: int,
    words: str, counts: list[int], shares: list[float], now: Tensor | None, group: str,
) -> Tensor:  # fmt: skip
    from vmoba_flex.selection.across_ranks import take_across

    rule = rule_of_flat(words, counts, shares, now)
    apart, competing = POOL_DIMS[rule.pool]
    pools, own = _pools(scores, _with_always(own, rule), apart, competing)
    place, length = torch.zeros((), dtype=torch.int64, device=scores.device), 1
    for each in competing:
        whole = size if each == dim else scores.shape[each]
        along = places if each == dim else torch.arange(whole, device=scores.device)
        place, length = (place[..., None] * whole + along).flatten(), length * whole
    taken = take_across(pools, own, place, length, _targets(rule, scores, length), group)
    return _unpooled(taken, scores, apart, competing)


def _with_always(own: Tensor, rule: Rule) -> Tensor:
    """``own``, and the blocks of ``rule.always`` for each query."""
    if rule.always:
        own = own.clone()
        for block in rule.always:  # fills, since an index of ids would have to come from the host
            own[:, block] = True
    return own


def _targets(rule: Rule, scores: Tensor, length: int) -> Targets:
    """What a rule keeps of each pool of ``length`` pairs."""
    max_pairs = rule.max_pairs(length, scores.shape[-1])
    if isinstance(rule, TopK):
        return Targets(max_pairs)
    tau = rule.tau
    if isinstance(rule, WarmedThreshold):
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("a rule must not be warmed up inside a CUDA graph, which would keep its tau")
        tau = rule.now.item()
    return Targets(max_pairs, tau, rule.normalize == "minmax")


def _search(scores: Tensor, pool: Pool) -> Literal["short", "long", "sort"]:
    """How the best pairs of each pool are found.

    Returns:
        ``"short"`` for the blocks of one query: a kernel that holds whole pools in registers. ``"long"`` for pools of
        many queries: kernels that pass over each pool a few times, with tables that are too large for a pool of each
        query. ``"sort"`` otherwise, which runs everywhere.
    """
    if not scores.is_cuda:
        return "sort"
    blocks = scores.shape[-1]
    if scores.dtype != torch.float32:
        _log_sort(f"the kernels take float32 scores, got {scores.dtype}")
    elif pool != "query":
        return "long"
    elif blocks <= SHORT:
        return "short"
    else:
        _log_sort(f"the kernel for pool='query' takes at most {SHORT} blocks, got {blocks}")
    return "sort"


@functools.cache
def _log_sort(reason: str) -> None:
    """Logs each reason once."""
    _LOG.warning("choosing blocks by a sort, which is slower than our kernels: %s", reason)


def _pools(scores: Tensor, own: Tensor, apart: list[int], competing: list[int]) -> tuple[Tensor, Tensor]:
    """Scores ``(pools, entries)``, and whether each is own ``(own pools, entries)``: pool p has row p modulo those."""
    pooled = scores.permute([*apart, *competing])
    # Pools that differ only in batch and head have the same own pairs.
    own = own.expand(1, scores.shape[1] if 1 in competing else 1, *own.shape).permute([*apart, *competing])
    own = own.flatten(0, len(apart) - 1).flatten(1).contiguous()
    return pooled.flatten(0, len(apart) - 1).flatten(1), own


def _unpooled(selected: Tensor, scores: Tensor, apart: list[int], competing: list[int]) -> Tensor:
    """The pairs taken of each pool, as a selection."""
    batch, heads, tokens, blocks = scores.shape
    order = [*apart, *competing]
    selected = selected.view([scores.shape[dim] for dim in order])
    by_block = selected.permute([order.index(dim) for dim in (0, 1, 3, 2)])
    # Flatten first, so that dims of size 1 get the strides that the fake promises.
    return by_block.flatten().view(batch, heads, blocks, tokens).mT


@_select.register_fake
@_select_across.register_fake
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.mT.shape, dtype=torch.bool).mT
