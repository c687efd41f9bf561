"""The steps of attention over packed rows in plain PyTorch: for any device, and what the kernels are held to.

``row_kernels.py`` has the steps that move rows, ``attend_kernels.py`` and ``flash_kernels.py`` the two that attend.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from block_masks.plans.moves import take_slots
from block_masks.plans.section import Section

# Scores held at a time, over tiles of rows, their rows and the slots that they may see: 256 MiB in float32.
_CHUNK_SCORES = 2**26

__all__ = ["backward", "delta", "forward", "merge_rows", "sum_rows", "take_slots"]


def merge_rows(
    output: Tensor, lse: Tensor, query_rows: Tensor, query_count: Tensor, merged: Tensor, merged_lse: Tensor,
    padding_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Merges each query's rows: the attention over all keys that any of its rows saw.

    Args:
        output: ``(rows, D)``, each row's softmax attention over its own keys.
        lse: ``(rows,)``, the natural log-sum-exp of each row's scores.
        query_rows: ``(H, G, S)``, see ``RowPlan``.
        query_count: ``(H, S)``.
        merged: ``(H, S, D)``, written: 0 where a query has no rows, NaN where not all of them had room.
        merged_lse: ``(H, S)``, written: -inf where a query has no rows, NaN where not all of them had room.
        padding_lse: ``(H, S)``, of what to leave out of each query's sum, see ``slot_steps.padding_lse``; None for
            nothing.
    """
    index = _listed(query_rows, query_count)
    parts = torch.where(index >= 0, lse[index.clamp(min=0)], -torch.inf)
    torch.logsumexp(parts, 1, out=merged_lse)
    # Not exp(parts - merged_lse): by the rounding of log-sum-exps these need not sum to 1, and where one key has nearly
    # all weight, gradients are differences from delta that nearly cancel.
    weights = torch.where(parts == -torch.inf, 0, parts.softmax(1))
    if padding_lse is not None:
        left = share_left(merged_lse, padding_lse)
        weights /= left[:, None]
        merged_lse += left.log()
    merged_lse.masked_fill_(query_count < 0, torch.nan)
    total = torch.zeros(merged.shape, dtype=_accumulator(merged), device=merged.device)
    for weight, rows in zip(weights.unbind(1), index.unbind(1), strict=True):
        total += weight[..., None] * torch.where((rows >= 0)[..., None], output[rows.clamp(min=0)], 0)
    merged.copy_(total.masked_fill_((query_count < 0)[..., None], torch.nan))


def share_left(lse: Tensor, padding_lse: Tensor) -> Tensor:
    """What padding slots leave of the sum of ``exp(score)``; all ``(H, S)``."""
    return 1 - torch.where(padding_lse == -torch.inf, 0, (padding_lse - lse).exp())


def sum_rows(rows: Tensor, query_rows: Tensor, query_count: Tensor, total: Tensor) -> None:
    """Adds up the rows ``(rows, D)`` of each query, in float32 at least, and writes the sums to ``total (H, S, D)``."""
    acc = torch.zeros(total.shape, dtype=_accumulator(rows), device=rows.device)
    for index in _listed(query_rows, query_count).unbind(1):
        acc += torch.where((index >= 0)[..., None], rows[index.clamp(min=0)], 0)
    total.copy_(acc)


def delta(grad: Tensor, output: Tensor) -> Tensor:
    """Sum over the value dim of ``grad * output``, both ``(..., value dim)``: ``(...)`` in float32 at least."""
    exact = _accumulator(grad)
    return (grad.to(exact) * output.to(exact)).sum(-1)


class Merged(NamedTuple):
    """What backward knows of the merged output of each query.

    Attributes:
        grad: ``(H, S, value dim)``, its gradient.
        lse: ``(H, S)``, the log-sum-exp of all its rows.
        delta: ``(H, S)``, the sum over the value dim of ``grad * output``.
    """

    grad: Tensor
    lse: Tensor
    delta: Tensor


def forward(query: Tensor, keys: Tensor, values: Tensor, section: Section, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a section's rows, each over its group's slots.

    Args:
        query: ``(H, S, D)``, of all heads.
        keys: ``(key heads, slots, D)``; query head h uses key head ``h // (H // key heads)``.
        values: ``(key heads, slots, value dim)``.
        section: which rows.
        scale: factor on the scores.

    Returns:
        The rows' outputs ``(rows, value dim)`` and the natural log-sum-exps of their scores ``(rows,)``, in float32 at
        least; unused tiles hold anything.
    """
    exact = _accumulator(query)
    output = query.new_zeros(*section.row_query.shape, values.shape[-1])
    lse = torch.zeros(len(output), dtype=exact, device=query.device)
    for chunk in _chunks(query, keys, values, section, scale):
        with torch.autocast(query.device.type, enabled=False):
            output[chunk.rows] = (chunk.scores.softmax(-1) @ chunk.values).to(output.dtype)
        lse[chunk.rows] = chunk.scores.logsumexp(-1)
    return output, lse


def backward(
    query: Tensor, keys: Tensor, values: Tensor, merged: Merged, grads: tuple[Tensor, Tensor], section: Section,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gradients through a section's rows.

    Args:
        query: as in ``forward``.
        keys: as in ``forward``.
        values: as in ``forward``.
        merged: what is known of each query's output.
        grads: gradients of keys ``(H, slots, D)`` and of values ``(H, slots, value dim)``; the slots of this section's
            heads are written.
        section: which rows.
        scale: factor on the scores.

    Returns:
        The gradients of the rows ``(rows, D)``; unused tiles hold anything.
    """
    exact = _accumulator(query)
    heads, head_slots = section.heads, keys.shape[1]
    grad_rows = torch.zeros(*section.row_query.shape, query.shape[-1], dtype=exact, device=query.device)
    sums = [torch.zeros(heads * head_slots, x.shape[-1], dtype=exact, device=x.device) for x in (keys, values)]
    for chunk in _chunks(query, keys, values, section, scale):
        place = section.row_query[chunk.rows]
        valid = (place >= 0)[..., None]
        do = torch.where(valid, merged.grad.flatten(0, 1)[place.clamp(min=0)].to(exact), 0)
        lse, delta = (x.flatten()[place.clamp(min=0)][..., None] for x in (merged.lse, merged.delta))
        with torch.autocast(query.device.type, enabled=False):
            p = torch.where(valid, (chunk.scores - lse).exp(), 0)
            ds = p * (do @ chunk.values.mT - delta) * scale
            grad_rows[chunk.rows] = ds @ chunk.keys
            for total, x in zip(sums, (ds.mT @ chunk.queries, p.mT @ do), strict=True):
                total.index_add_(0, chunk.targets.flatten(), x.flatten(0, 1))
    for target, total in zip(grads, sums, strict=True):
        target[section.of_heads] = total.view(heads, head_slots, -1).to(target.dtype)
    return grad_rows


class _Chunk(NamedTuple):
    """A few tiles of rows, in float32 at least; W slots are the most that a group has keys.

    Attributes:
        rows: ``(tiles, tile_size)``.
        queries: ``(tiles, tile_size, D)``, zero in padding rows.
        keys: ``(tiles, W, D)``, zero past the group's end, since zero times what another group holds may be NaN.
        values: ``(tiles, W, value dim)``, zero past the group's end, too.
        scores: ``(tiles, tile_size, W)``, -inf past the group's end.
        targets: ``(tiles, W)``, the slots, counted over the query heads of the section.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    targets: Tensor


def _chunks(query: Tensor, keys: Tensor, values: Tensor, section: Section, scale: float) -> Iterator[_Chunk]:
    exact = _accumulator(query)
    plan, slots, head_slots = section.plan, section.slots, keys.shape[1]
    tile, groups, repeats = plan.tile_size, section.groups, len(query) // len(keys)
    within = torch.arange(max(slots.group_sizes), device=query.device)
    used = (section.row_pool >= 0).nonzero().flatten()
    for tiles in used.split(max(1, _CHUNK_SCORES // (tile * len(within)))):
        pool = section.row_pool[tiles]
        head, group = pool // groups, pool % groups
        valid = within < section.pool_lengths[pool][:, None]
        slot = torch.where(valid, slots.first_slot[group][:, None] + within, 0)
        index = slot + (head // repeats * head_slots)[:, None]
        k, v = (torch.where(valid[..., None], x.flatten(0, 1)[index].to(exact), 0) for x in (keys, values))
        rows = tiles[:, None] * tile + torch.arange(tile, device=query.device)
        place = section.row_query[rows]
        q = torch.where((place >= 0)[..., None], query.flatten(0, 1)[place.clamp(min=0)].to(exact), 0)
        with torch.autocast(query.device.type, enabled=False):
            scores = (q @ k.mT * scale).masked_fill(~valid[:, None], -torch.inf)
        yield _Chunk(rows, q, k, v, scores, slot + (head % section.heads * head_slots)[:, None])


def _listed(query_rows: Tensor, query_count: Tensor) -> Tensor:
    """The rows of each query ``(H, G, S)``, -1 past the last."""
    place = torch.arange(query_rows.shape[1], device=query_rows.device)[:, None]
    return torch.where(place < query_count[:, None], query_rows, -1).long()


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
