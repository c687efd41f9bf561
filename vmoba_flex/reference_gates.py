"""The gates in float64, by their definitions: what scores the blocks of ``reference``.

B batch, H heads, S video tokens in raster order, N blocks, D head dim.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

LEAST_VARIANCE = 1e-12  # of a cell's scores


def block_ids(grid: tuple[int, int, int], block: tuple[int, int, int], chunk: int | None = None) -> Tensor:
    """Block id of each video token in raster order, int64 ``(T * H * W,)``; blocks end with their chunk of frames."""
    t, y, x = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    _, cells_y, cells_x = (math.ceil(size / part) for size, part in zip(grid, block, strict=True))
    slab = t // block[0] if chunk is None else t // chunk * math.ceil(chunk / block[0]) + t % chunk // block[0]
    ids = slab * (cells_y * cells_x) + y // block[1] * cells_x + x // block[2]
    return ids.reshape(-1)


def ids_of(partition: Any) -> Tensor:
    """``block_ids`` of a partition."""
    return block_ids(partition.grid, partition.block, partition.causal_frames)


def chunks_of(partition: Any) -> tuple[Tensor, Tensor]:
    """The chunk of each video token and of each block, int64; all 0 if the partition is not causal."""
    frames, height, width = partition.grid
    tokens = torch.arange(frames * height * width) // (height * width) // (partition.causal_frames or frames)
    ids = ids_of(partition)
    return tokens, torch.stack([tokens[ids == n][0] for n in range(int(ids.max()) + 1)])


def cell_members(partition: Any, cell: tuple[int, int, int]) -> list[tuple[int, list[int]]]:
    """The block of each cell, and its video tokens; cells are counted from the corner of their block."""
    ids, members = ids_of(partition), {}
    for token, (t, y, x) in enumerate(itertools.product(*map(range, partition.grid))):
        place = (t % (partition.causal_frames or t + 1), y, x)  # blocks start anew in each chunk
        corner = [p % side // part for p, side, part in zip(place, partition.block, cell, strict=True)]
        members.setdefault((int(ids[token]), *corner), []).append(token)
    return [(block, tokens) for (block, *_), tokens in members.items()]


def gate_scores(
    query: Tensor, key: Tensor, partition: Any, of: str, cell: tuple[int, int, int] | None = None
) -> Tensor:
    """Scores of each block, float64 ``(B, H, queries, N)``.

    Args:
        query: ``(B, H, queries, D)``.
        key: ``(B, key heads, S, D)``.
        partition: the blocks.
        of: which gate's: ``"mean"``, ``"cells"``, ``"spread"`` or ``"exact"``.
        cell: tokens of a cell ``(ct, ch, cw)``, for ``"cells"`` and ``"spread"``.
    """
    ids = ids_of(partition).to(key.device)
    if of == "mean":
        return gate(query, key, ids)
    if of == "exact":
        return block_lse(query, key, ids)
    assert cell is not None
    return cell_gate(query, key, cell_members(partition, cell), of == "spread")


def tile_scores(
    query: Tensor, key: Tensor, tiles: Tensor, partition: Any, of: str, cell: tuple[int, int, int] | None = None,
    blocks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores of tiles of queries, float64 ``(B, H, tiles, N)``: by the tile's mean query, or its mean mass for "exact".

    ``tiles``: int64 ``(S,)``, the tile of each query. ``blocks``: own block of each query, where the partition is
    causal; a later chunk has no mass then.
    """
    members = [tiles == tile for tile in range(int(tiles.max()) + 1)]
    if of == "exact":
        lse, (_, of_blocks) = gate_scores(query, key, partition, of), chunks_of(partition)
        if blocks is not None:
            lse = lse.masked_fill(of_blocks > of_blocks[blocks.cpu()][:, None], -math.inf)
        shares = lse.log_softmax(-1)
        return torch.stack([shares[:, :, at].logsumexp(2) - math.log(int(at.sum())) for at in members], 2)
    means = torch.stack([query.double()[:, :, at].mean(2) for at in members], 2)
    return gate_scores(means, key, partition, of, cell)


def gate(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    """Products of queries with block means, float64 ``(B, H, video tokens, N)``.

    Args:
        query: ``(B, H, video tokens, D)``.
        key: ``(B, key heads, video tokens, D)``.
        ids: block of each token.
    """
    query, key = query.double(), match_heads(key.double(), query.shape[1])
    means = [key[:, :, ids == n].mean(2) for n in range(int(ids.max()) + 1)]
    return torch.einsum("bhsd,bhnd->bhsn", query, torch.stack(means, dim=2))


def cell_gate(query: Tensor, key: Tensor, members: list[tuple[int, list[int]]], spread: bool) -> Tensor:
    """The gates "cells" and "spread", float64 ``(B, H, queries, N)``.

    Args:
        query: ``(B, H, queries, D)``.
        key: ``(B, key heads, S, D)``.
        members: block and tokens of each cell.
        spread: whether each cell counts times the standard deviation of its scores.
    """
    query, key = query.double() / math.sqrt(query.shape[-1]), match_heads(key.double(), query.shape[1])
    terms: dict[int, list[Tensor]] = {}
    for block, tokens in members:
        keys = key[:, :, tokens]
        mean, variance = keys.mean(2), keys.var(2, correction=0)
        of_scores = torch.einsum("bhsd,bhd->bhs", query.square(), variance)
        term = torch.einsum("bhsd,bhd->bhs", query, mean) + math.log(len(tokens)) + of_scores / 2
        if spread:
            term = term + of_scores.clamp(min=LEAST_VARIANCE).log() / 2
        terms.setdefault(block, []).append(term)
    return torch.stack([torch.stack(terms[block]).logsumexp(0) for block in sorted(terms)], -1)


def block_lse(query: Tensor, key: Tensor, groups: Tensor, scale: float | None = None) -> Tensor:
    """The log-sum-exp of each query's scaled scores over the keys of each group, float64 ``(B, H, queries, groups)``.

    ``groups``: int64, the group of each key, and -1 for a key that is masked. ``scale``: ``1 / sqrt(D)`` if None.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.double() @ match_heads(key.double(), query.shape[1]).mT * scale
    return torch.stack([scores[..., groups == n].logsumexp(-1) for n in range(int(groups.max()) + 1)], -1)


def block_masses(
    query: Tensor, key: Tensor, partition: Any, scale: float | None = None, text_lengths: Tensor | None = None
) -> Tensor:
    """The share of each video query's full attention on each block, float64 ``(B, H, S, N)``; causal if it is.

    Args:
        query: ``(B, H, tokens, D)``, prefix and suffix included.
        key: ``(B, key heads, tokens, D)``.
        partition: the blocks.
        scale: ``1 / sqrt(D)`` if None.
        text_lengths: ``(B,)``, how many prefix and suffix tokens of a sample are valid, the first ones; None for all.
    """
    ids = ids_of(partition)
    of_tokens, of_blocks = (x.to(query.device) for x in chunks_of(partition))
    blocks, first = int(ids.max()) + 1, partition.prefix
    text = [*range(first), *range(first + len(ids), query.shape[2])]
    shares = []
    for sample in range(query.shape[0]):
        groups = torch.full((query.shape[2],), -1)
        groups[first : first + len(ids)] = ids
        groups[text[: len(text) if text_lengths is None else int(text_lengths[sample])]] = blocks
        queries, keys = query[sample : sample + 1, :, first : first + len(ids)], key[sample : sample + 1]
        lse = block_lse(queries, keys, groups.to(query.device), scale)
        lse[..., :blocks] = lse[..., :blocks].masked_fill(of_blocks > of_tokens[:, None], -math.inf)
        shares.append(lse.softmax(-1)[..., :blocks])
    return torch.cat(shares)


def mass(scores: Tensor, ids: Tensor, head_dim: int) -> Tensor:
    """The attention mass of each block if all of its keys were their mean, float64 like ``scores``.

    Args:
        scores: the gate ``(B, H, queries, N)``.
        ids: block of each token that is a key.
        head_dim: of query and key.
    """
    terms = ids.bincount() * ((scores - scores.amax(-1, keepdim=True)).double() / math.sqrt(head_dim)).exp()
    return torch.where(scores.isfinite().all(-1, keepdim=True), terms / terms.sum(-1, keepdim=True), math.nan)


def ranked(scores: Tensor, ids: Tensor, rule: Any, head_dim: int) -> Tensor:
    """What a rule ranks: its gate's scores, or the masses that they stand for."""
    if getattr(rule, "normalize", None) != "softmax":
        return scores
    if rule.gate == "mean":
        return mass(scores, ids, head_dim)
    return torch.where(scores.isfinite().all(-1, keepdim=True), scores.softmax(-1), math.nan)


def match_heads(x: Tensor, heads: int) -> Tensor:
    """``x`` with each of its heads repeated, to have so many."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
