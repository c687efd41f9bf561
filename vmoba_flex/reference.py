"""VMoBA in float64, by its definition: what every fast path is tested against.

Everything is computed from coordinates, in raster order, pool by pool, with S x S masks: slow on purpose. This module
and ``reference_gates``, which has the gates, import none of the code that they check, and read only the fields of
partitions and rules.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.reference_gates import block_ids, cell_members, gate_scores, match_heads, ranked, tile_scores


def select(scores: Tensor, ids: Tensor, rule: Any) -> Tensor:
    """The selection that ``rule`` makes from ``scores``, bool like ``scores``.

    Args:
        scores: ``(B, H, video tokens, N)``; masses where ``rule.normalize`` is ``"softmax"``.
        ids: block of each token.
        rule: has ``pool`` and ``always``, and ``tau``, ``max_density`` and ``normalize``, or ``k`` and ``density``.
    """
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    kept = torch.isin(blocks, torch.tensor(rule.always, dtype=torch.int64, device=scores.device))
    own = ((ids[:, None].to(scores.device) == blocks) | kept).expand_as(scores)
    selected = own.clone()
    # Each pool as a view whose dims stand in the order that breaks ties: block, query, head.
    views = {
        "query": lambda x: x.flatten(0, 2),
        "block": lambda x: x.permute(0, 3, 2, 1).flatten(0, 1),
        "head": lambda x: x.permute(0, 1, 3, 2).flatten(0, 1),
        "global": lambda x: x.permute(0, 3, 2, 1),
    }
    view = views[rule.pool]
    rows_per_pool = {"query": 1, "block": None, "head": scores.shape[2], "global": scores.shape[1] * scores.shape[2]}
    result = view(selected).clone()
    for pool in range(result.shape[0]):
        flat_scores, flat_own = view(scores)[pool].reshape(-1).double(), view(own)[pool].reshape(-1)
        chosen = _select_pool(flat_scores, flat_own, rule, rows_per_pool[rule.pool], scores.shape[-1])
        result[pool] = chosen.view(result[pool].shape)
    batch, heads, tokens, blocks = scores.shape
    if rule.pool == "query":
        return result.view(batch, heads, tokens, blocks)
    if rule.pool == "head":
        return result.view(batch, heads, blocks, tokens).transpose(2, 3)
    return result.reshape(batch, blocks, tokens, heads).permute(0, 3, 2, 1)


def _select_pool(scores: Tensor, own: Tensor, rule: Any, rows: int | None, num_blocks: int) -> Tensor:
    """One pool, entries in the order that breaks ties."""
    ranked = sorted(enumerate(scores.tolist()), key=lambda pair: (0, 0.0) if math.isnan(pair[1]) else (1, -pair[1]))
    is_own = own.tolist()
    others = [i for i, _ in ranked if not is_own[i]]
    if hasattr(rule, "tau"):
        others = others[: _threshold_length(scores, own, others, rule)]
        if rule.max_density is not None:
            cap = math.floor(rule.max_density * len(scores) + 0.5)
            others = others[: max(0, cap - int(own.sum()))]
    else:
        assert rows is not None
        k = rule.k if rule.k is not None else max(1, math.floor(rule.density * num_blocks + 0.5))
        others = others[: max(0, k * rows - int(own.sum()))]
    selected = own.clone()
    selected[others] = True
    return selected


def _threshold_length(scores: Tensor, own: Tensor, others: list[int], rule: Any) -> int:
    if not scores.isfinite().all():
        return len(others)
    shares = scores
    if rule.normalize == "minmax":
        spread = scores.max() - scores.min()
        shares = (scores - scores.min()) / (spread if spread > 1e-6 else 1.0)
    total = shares.sum() + 1e-6
    rest = max(0.0, float(rule.tau - shares[own].sum() / total))
    if rest == 0:
        return 0
    reached = shares[others].cumsum(0) / total >= rest
    return int(reached.int().argmax()) + 1 if reached.any() else len(others)


def shared_tiles(ids: Tensor, tile_size: int) -> Tensor:
    """Query tile of each video token, for the dispatch ``"shared"``: int64 ``(video tokens,)``.

    The tokens of each block, with ``ids`` in raster order, fill tiles of ``tile_size``; the last may be shorter.
    """
    tiles, first = torch.empty_like(ids), 0
    for block in range(int(ids.max()) + 1):
        tokens = (ids == block).nonzero().flatten()
        for count, token in enumerate(tokens.tolist()):
            tiles[token] = first + count // tile_size
        first += math.ceil(len(tokens) / tile_size)
    return tiles


def attention_mask(selection: Tensor, partition: Any, text_lengths: Tensor | None = None) -> Tensor:
    """Which key each query attends, bool ``(B, H, S, S)`` in raster order.

    Prefix and suffix attend everything, and everything attends them: with ``text_lengths`` ``(B,)``, only the first
    so many prefix and suffix tokens of each sample.
    """
    ids = block_ids(partition.grid, partition.block).to(selection.device)
    batch, heads, tokens, _ = selection.shape
    total = partition.prefix + tokens + partition.suffix
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool, device=selection.device)
    video = slice(partition.prefix, partition.prefix + tokens)
    mask[:, :, video, video] = selection[..., ids]
    if text_lengths is not None:
        text = [*range(partition.prefix), *range(partition.prefix + tokens, total)]
        for sample, length in enumerate(text_lengths.tolist()):
            mask[sample, :, :, text[length:]] = False
    return mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64 over the keys that ``mask`` allows, differentiable.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, keys, D)``.
        value: ``(B, key heads, keys, value dim)``.
        mask: bool ``(B, H, S, keys)``; None for all.
        scale: ``1 / sqrt(D)`` if None.
        bias: float64 ``(keys,)``, added to each key's scaled scores.

    Returns:
        The output ``(B, H, S, value dim)`` and the natural log-sum-exp of the scores ``(B, H, S)``.
    """
    key, value = match_heads(key.double(), query.shape[1]), match_heads(value.double(), query.shape[1])
    scores = query.double() @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def with_cells(
    key: Tensor, value: Tensor, selection: Tensor, mask: Tensor, partition: Any, cell: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tail: keys, then the mean of each of ``C`` cells, which a query attends where it did not choose the block.

    Args:
        key: ``(B, key heads, S, D)`` in raster order.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video tokens, N)``.
        mask: bool ``(B, H, S, S)``, which keys each query attends.
        partition: the blocks.
        cell: tokens of a cell ``(ct, ch, cw)``, counted from the corner of its block.

    Returns:
        Key and value with ``S + C`` keys, the mask ``(B, H, S, S + C)``, and the bias ``(S + C,)``, the log of a cell's
        tokens; float64.
    """
    members = cell_members(partition, cell)
    first, count = partition.prefix, math.prod(partition.grid)
    video = [x.double()[:, :, first : first + count] for x in (key, value)]
    means = [torch.stack([x[:, :, at].mean(2) for _, at in members], 2) for x in video]
    blocks = torch.tensor([block for block, _ in members], device=key.device)
    others = torch.zeros((*mask.shape[:3], len(members)), dtype=torch.bool, device=mask.device)
    others[:, :, first : first + count] = ~selection[..., blocks]
    sizes = torch.tensor([len(at) for _, at in members], dtype=torch.float64, device=key.device)
    bias = torch.cat([torch.zeros(key.shape[2], dtype=torch.float64, device=key.device), sizes.log()])
    key, value = (torch.cat([x.double(), mean], 2) for x, mean in zip((key, value), means, strict=True))
    return key, value, torch.cat([mask, others], -1), bias


def vmoba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: Any,
    rule: Any,
    scale: float | None = None,
    tile_size: int | None = None,
    cell: tuple[int, int, int] | None = None,
    gate_cell: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole of VMoBA: the output in float64 ``(B, H, S, value dim)`` and the selection it used.

    With ``tile_size``, the approximation that the dispatch ``"shared"`` makes: one selection for each query tile, made
    from the mean of its queries, and given to all of them. With ``cell``, skipped blocks take part by cells.
    ``gate_cell``: the cells of the gates "cells" and "spread".
    """
    ids = block_ids(partition.grid, partition.block).to(query.device)
    video = slice(partition.prefix, partition.prefix + len(ids))
    with torch.no_grad():
        queries, keys = query[:, :, video].double(), key[:, :, video]
        if tile_size is None:
            scores = gate_scores(queries, keys, partition, rule.gate, gate_cell)
            selection = select(ranked(scores, ids, rule, query.shape[-1]), ids, rule)
        else:
            tiles = shared_tiles(ids, tile_size)
            scores = tile_scores(queries, keys, tiles, partition, rule.gate, gate_cell)
            tile_block = torch.stack([ids[tiles == tile][0] for tile in range(scores.shape[2])])
            scores = ranked(scores, ids, rule, query.shape[-1])
            selection = select(scores, tile_block, rule)[:, :, tiles]
    mask, bias = attention_mask(selection, partition), None
    if cell is not None:
        key, value, mask, bias = with_cells(key, value, selection, mask, partition, cell)
    output, _ = attention(query, key, value, mask, scale, bias)
    return output, selection
