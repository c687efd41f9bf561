"""VMoBA in float64, by its definition: what every fast path is tested against.

Everything is computed from coordinates, in raster order, pool by pool, with S x S masks: slow on purpose. This module,
``reference_gates``, which has the gates, and ``reference_selection``, which has the rules, import none of the code that
they check, and read only the fields of partitions and rules.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.reference_gates import block_ids, cell_members, chunks_of, gate_scores, ids_of, match_heads, tile_scores
from vmoba_flex.reference_selection import select, select_in_chunks

__all__ = ["attention", "attention_mask", "block_ids", "select", "shared_tiles", "vmoba", "with_cells"]


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


def attention_mask(
    selection: Tensor, partition: Any, text_lengths: Tensor | None = None, frames: tuple[int, int] | None = None
) -> Tensor:
    """Which key each query attends, bool ``(B, H, S, S)`` in raster order.

    Prefix and suffix attend everything, in a causal partition only themselves, and everything attends them: with
    ``text_lengths`` ``(B,)``, only the first so many prefix and suffix tokens of each sample. A later chunk is never
    attended. With ``frames``, selection and mask have the queries of these video frames only.
    """
    ids, (of_tokens, _) = ids_of(partition), chunks_of(partition)
    batch, heads, tokens = *selection.shape[:2], len(ids)
    total = partition.prefix + tokens + partition.suffix
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool, device=selection.device)
    video = slice(partition.prefix, partition.prefix + tokens)
    if partition.causal_frames is not None:
        mask[:, :, :, video] = False
    rows = _rows_of(partition, frames)
    past = (of_tokens <= of_tokens[rows][:, None]).to(selection.device)
    mask[:, :, video, video][:, :, rows] = selection[..., ids] & past
    if text_lengths is not None:
        text = [*range(partition.prefix), *range(partition.prefix + tokens, total)]
        for sample, length in enumerate(text_lengths.tolist()):
            mask[sample, :, :, text[length:]] = False
    return mask if frames is None else mask[:, :, video][:, :, rows]


def _rows_of(partition: Any, frames: tuple[int, int] | None) -> slice:
    """The video tokens of some frames, or all."""
    count, height, width = partition.grid
    first, end = frames or (0, count)
    return slice(first * height * width, end * height * width)


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
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    mask: Tensor,
    partition: Any,
    cell: tuple[int, int, int],
    frames: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tail: keys, then the mean of each of ``C`` cells, which a query attends where it did not choose the block.

    No query attends the cells of a later chunk.

    Args:
        key: ``(B, key heads, S, D)`` in raster order.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video tokens, N)``.
        mask: bool ``(B, H, S, S)``, which keys each query attends.
        partition: the blocks.
        cell: tokens of a cell ``(ct, ch, cw)``, counted from the corner of its block.
        frames: those of the queries; None for all queries, prefix and suffix included.

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
    of_tokens, of_blocks = (x.to(mask.device) for x in chunks_of(partition))
    past = of_blocks[blocks] <= of_tokens[_rows_of(partition, frames)][:, None]
    if frames is None:
        others[:, :, first : first + count] = ~selection[..., blocks] & past
    else:
        others[:] = ~selection[..., blocks] & past
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
    frames: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole of VMoBA: the output in float64 ``(B, H, S, value dim)`` and the selection it used.

    With ``tile_size``, the approximation that the dispatch ``"shared"`` makes: one selection for each query tile, made
    from the mean of its queries, and given to all of them. With ``cell``, skipped blocks take part by cells.
    ``gate_cell``: the cells of the gates "cells" and "spread". ``frames``: query holds the tokens of these video frames
    only, from the first to before the second.
    """
    ids = ids_of(partition).to(query.device)
    video = slice(partition.prefix, partition.prefix + len(ids))
    own = ids[_rows_of(partition, frames)]
    with torch.no_grad():
        queries, keys = (query[:, :, video] if frames is None else query).double(), key[:, :, video]
        if tile_size is None:
            scores = gate_scores(queries, keys, partition, rule.gate, gate_cell)
            selection = select_in_chunks(scores, own, partition, rule, query.shape[-1])
        else:
            tiles = shared_tiles(own, tile_size)
            scores = tile_scores(queries, keys, tiles, partition, rule.gate, gate_cell, own)
            tile_block = torch.stack([own[tiles == tile][0] for tile in range(scores.shape[2])])
            selection = select_in_chunks(scores, tile_block, partition, rule, query.shape[-1])[:, :, tiles]
    mask, bias = attention_mask(selection, partition, frames=frames), None
    if cell is not None:
        key, value, mask, bias = with_cells(key, value, selection, mask, partition, cell, frames)
    output, _ = attention(query, key, value, mask, scale, bias)
    return output, selection
