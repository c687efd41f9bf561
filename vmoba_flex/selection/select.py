"""Which blocks each query attends: one algorithm over pools, for both rules."""

import math

import torch
from torch import Tensor

from block_masks.launching.device import on_device
from vmoba_flex.inputs import check_query_key
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.selection.gate import gate
from vmoba_flex.selection.mass import block_mass
from vmoba_flex.selection.weights import fraction_bits, rest_to_reach, scaled_weights
from vmoba_flex.warmup import WarmedThreshold

# For each pool, the dims of a (B, H, S, N) gate that stay apart and those that compete. The competing dims stand in
# the order that breaks ties: block id, then query index, then head.
POOL_DIMS = {
    "query": ([0, 1, 2], [3]),
    "block": ([0, 3], [2, 1]),
    "head": ([0, 1], [3, 2]),
    "global": ([0], [3, 2, 1]),
}


def vmoba_selection(query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule) -> Tensor:
    """Chooses the blocks that each video query attends (arXiv 2506.23858, Sec. 3).

    Every query's own block is chosen. Pools never span samples. Nothing is read back to the host.

    Args:
        query: ``(B, H, S, D)`` in raster order, prefix and suffix included; floating point.
        key: ``(B, key heads, S, D)``; where it has fewer heads, query head h uses key head ``h // (H // key heads)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.

    Returns:
        bool ``(B, H, video tokens, N)`` in raster order; block by block in memory, so not contiguous.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or ``k`` do not fit, or the selection has 2**31 entries or more.
    """
    check_query_key(query, key, partition, rule)
    return choose_blocks(query, key, partition, rule)


def choose_blocks(
    query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule, part: Part | None = None
) -> Tensor:
    """``vmoba_selection`` of inputs that have been checked, or of the part of a call that lies here."""
    ids, queries = partition.block_ids(query.device), None
    if part is not None:
        queries = part.queries
        ids = ids[queries.first : queries.first + queries.video]
    blocks = torch.arange(partition.num_blocks, device=query.device)
    scores = ranked(gate(query, key, partition, queries), partition, rule, query.shape[-1])
    return select(scores, (blocks[:, None] == ids).mT, rule, part)


def ranked(scores: Tensor, partition: BlockPartition, rule: Rule, head_dim: int) -> Tensor:
    """What a rule ranks: the gate's scores, or the masses that they estimate."""
    softmax = isinstance(rule, Threshold) and rule.normalize == "softmax"
    return block_mass(scores, partition, head_dim) if softmax else scores


def select(scores: Tensor, own: Tensor, rule: Rule, part: Part | None = None) -> Tensor:
    """Applies a rule to what it ranks.

    Args:
        scores: floating ``(B, H, S, N)``; masses in 0..1, or NaN, for a ``Threshold`` with ``normalize="softmax"``.
        own: bool ``(S, N)``, True at each query's own block.
        rule: ``TopK`` or ``Threshold``.
        part: what of a call these scores are; None for all. All ranks of its group call this where its heads or queries
            compete with those of others, and then the choice is the one that a single process would make, to the bit.

    Returns:
        bool ``(B, H, S, N)``, the transpose of a contiguous ``(B, H, N, S)``.
    """
    apart, competing = POOL_DIMS[rule.pool]
    part = part if part is not None and part.dim in competing else None
    sizes = [scores.shape[dim] if part is None or dim != part.dim else part.size for dim in competing]
    max_pairs = rule.max_pairs(math.prod(sizes), scores.shape[-1])
    tau, stretch = (rule.tau, rule.normalize == "minmax") if isinstance(rule, Threshold) else (None, True)
    now = rule.now if isinstance(rule, WarmedThreshold) else None
    targets = max_pairs, tau, stretch, now
    if part is None:
        return _select(scores, own, apart, competing, *targets)
    return _select_across(scores, own, part.places, part.dim, sizes, apart, competing, *targets, part.group)


# Opaque to Inductor, which on torch 2.11 fails to fuse scans as long as a pool with what surrounds them, and which
# could otherwise compute a selection twice, rounding the gate differently for the tile lists and for the words.
@torch.library.custom_op("vmoba_flex::select", mutates_args=())
@on_device
def _select(
    scores: Tensor, own: Tensor, apart: list[int], competing: list[int],
    max_pairs: int | None, tau: float | None, stretch: bool, now: Tensor | None,
) -> Tensor:  # fmt: skip
    tau = tau if now is None else _now(scores, now)
    batch, heads, tokens, blocks = scores.shape
    on_gpu = scores.is_cuda and scores.dtype == torch.float32
    if on_gpu and len(apart) == 3:
        from vmoba_flex.selection import short_pool_kernels

        if blocks <= short_pool_kernels.SHORT:
            one_bits = fraction_bits(blocks)
            return (
                short_pool_kernels.take_short(scores.flatten(0, 1), own, max_pairs, tau, stretch, one_bits)
                .view(batch, heads, blocks, tokens)
                .mT
            )
    pools, own = _pools(scores, own, apart, competing)
    if on_gpu and len(apart) < 3:
        from vmoba_flex.selection import long_pool_kernels

        selected = long_pool_kernels.take_long(
            pools.contiguous(), own, max_pairs, tau, stretch, fraction_bits(pools.shape[1])
        )
    else:
        selected = _take(pools, own, max_pairs, tau, stretch)
    return _unpooled(selected, scores, apart, competing)


# Opaque too, with its collectives inside.
@torch.library.custom_op("vmoba_flex::select_across", mutates_args=())
@on_device
def _select_across(
    scores: Tensor, own: Tensor, places: Tensor, dim: int, sizes: list[int], apart: list[int], competing: list[int],
    max_pairs: int | None, tau: float | None, stretch: bool, now: Tensor | None, group: str,
) -> Tensor:  # fmt: skip
    from vmoba_flex.selection.across_ranks import take_across

    tau = tau if now is None else _now(scores, now)
    pools, own = _pools(scores, own, apart, competing)
    place = torch.zeros((), dtype=torch.int64, device=scores.device)
    for one, size in zip(competing, sizes, strict=True):
        along = places if one == dim else torch.arange(size, device=scores.device)
        place = (place[..., None] * size + along).flatten()
    selected = take_across(pools, own, place, math.prod(sizes), max_pairs, tau, stretch, group)
    return _unpooled(selected, scores, apart, competing)


def _now(scores: Tensor, now: Tensor) -> float:
    """The tau in force of a rule that is warmed up."""
    if scores.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("a rule must not be warmed up inside a CUDA graph, which would keep its tau")
    return now.item()


def _pools(scores: Tensor, own: Tensor, apart: list[int], competing: list[int]) -> tuple[Tensor, Tensor]:
    """Scores ``(pools, entries)``, and whether each is own ``(own pools, entries)``: pool p has row p modulo those."""
    pooled = scores.permute([*apart, *competing])
    # Pools that differ in batch and head alone have the same own pairs.
    own = own.expand(1, scores.shape[1] if 1 in competing else 1, *own.shape).permute([*apart, *competing])
    own = own.flatten(0, len(apart) - 1).flatten(1).contiguous()
    return pooled.flatten(0, len(apart) - 1).flatten(1), own


def _unpooled(selected: Tensor, scores: Tensor, apart: list[int], competing: list[int]) -> Tensor:
    """What was taken of each pool, as a selection."""
    batch, heads, tokens, blocks = scores.shape
    order = [*apart, *competing]
    selected = selected.view([scores.shape[dim] for dim in order])
    by_block = selected.permute([order.index(dim) for dim in (0, 1, 3, 2)])
    # Flat in between, so that dims of size 1 have the strides that the fake promises.
    return by_block.flatten().view(batch, heads, blocks, tokens).mT


@_select.register_fake
@_select_across.register_fake
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.mT.shape, dtype=torch.bool).mT


def _take(scores: Tensor, own: Tensor, max_pairs: int | None, tau: float | None, stretch: bool) -> Tensor:
    """Own pairs and the best others, per pool: the shortest prefix that reaches every target.

    A pair belongs to that prefix exactly if what ranks before it falls short of the target, for each criterion.

    Args:
        scores: floating ``(pools, entries)``, entries in the order that breaks ties.
        own: bool ``(own pools, entries)``; pool p has row ``p % own pools``.
        max_pairs: pairs that a pool keeps, own ones included; None for no cap.
        tau: share of the pool's weights to reach; None for no target.
        stretch: whether weights are the scores scaled by the pool's minimum and maximum, or as they are, in 0..1.

    Returns:
        bool ``(pools, entries)``.
    """
    own = own.repeat(scores.shape[0] // own.shape[0], 1)
    # NaNs with either sign, and the two zeros, compare equal here but not in every sort.
    scores = torch.where(scores.isnan(), torch.nan, torch.where(scores == 0, 0.0, scores))
    rank = scores.argsort(dim=-1, descending=True, stable=True)
    others = (~own).gather(-1, rank)
    taken = others
    if max_pairs is not None:
        taken = taken & (_before(others.long()) < max_pairs - own.sum(-1, keepdim=True))
    if tau is not None:
        least, most = scores.aminmax(dim=-1, keepdim=True)
        weights, finite = scaled_weights(scores, least, most, scores.shape[-1], stretch)
        total, of_own = weights.sum(-1, keepdim=True), (own * weights).sum(-1, keepdim=True)
        rest = rest_to_reach(total, of_own, finite, tau, scores.shape[-1])
        taken = taken & (_before(others * weights.gather(-1, rank)) < rest)
    return own | torch.zeros_like(own).scatter(-1, rank, taken)


def _before(weights: Tensor) -> Tensor:
    """Sum of what stands before each entry of the last dim."""
    return weights.cumsum(-1) - weights
