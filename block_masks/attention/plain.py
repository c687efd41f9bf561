"""The attention of our ops in plain PyTorch, which all of torch's transforms see through.

Costs as much as full attention, and keeps all scores for backward.

Shapes: ``H`` query heads of all samples, ``S`` queries, ``K`` keys, ``G`` groups, ``C`` coarse keys, ``D`` head dim.
"""

import torch
from torch import Tensor

from block_masks.attention.coarse_steps import CoarseKeys
from block_masks.plans.slots import Slots
from block_masks.precision import accumulator, without_autocast


def plain_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    group_lengths: Tensor | None,
    slots: Slots,
    scale: float,
    coarse: CoarseKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend_rows``: each query attends the keys of its groups, and coarse keys of the others.

    Args:
        query: ``(H, S, D)``.
        key: ``(key heads, K, D)``.
        value: ``(key heads, K, value dim)``.
        selected: bool ``(H, S, G)``.
        group_lengths: int32 ``(H, G)``, or None.
        slots: of these keys and groups.
        scale: factor on the scores.
        coarse: keys of the groups that a query did not choose.

    Returns:
        ``(H, S, value dim)`` and ``(H, S)``.
    """
    group = slots.slot_group[slots.key_slot]
    attended = selected[..., group.clamp(min=0).long()] & (group >= 0)
    if group_lengths is not None:
        attended = attended & slots.valid(group_lengths).slots[:, None, slots.key_slot]
    output, lse = plain_attention(query, key, value, attended, scale)
    return (output, lse) if coarse is None else plain_merge(query, output, lse, coarse, selected, scale)


def plain_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    group_lengths: Tensor | None,
    slots: Slots,
    scale: float,
    coarse: CoarseKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend_slots``: each tile of slots attends the keys of its groups, and coarse keys of the others.

    Args:
        query: ``(B, H, slots, D)``.
        key: like ``query``.
        value: ``(B, H, slots, value dim)``.
        selected: bool ``(B, H, tiles, G)``.
        group_lengths: int32 ``(B, G)``, or None.
        slots: of these tiles and groups.
        scale: factor on the scores.
        coarse: keys of the groups that a tile did not choose, ``B * H`` heads of them.

    Returns:
        ``(B, H, slots, value dim)`` and ``(B, H, slots)``.
    """
    chosen = selected.repeat_interleave(slots.tile_size, 2)
    valid = slots.slot_group >= 0 if group_lengths is None else slots.valid(group_lengths).slots[:, None, None]
    attended = chosen[..., slots.slot_group.clamp(min=0).long()] & valid
    queries, keys, values, attended = (x.flatten(0, 1) for x in (query, key, value, attended))
    output, lse = plain_attention(queries, keys, values, attended, scale)
    if coarse is not None:
        output, lse = plain_merge(queries, output, lse, coarse, chosen.flatten(0, 1), scale)
    return output.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attended: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that ``attended`` allows, bool ``(H, S, K)``; 0 and -inf where it allows none."""
    exact, repeats = accumulator(query), len(query) // len(key)
    key, value = (x.repeat_interleave(repeats, 0).to(exact) for x in (key, value))
    with without_autocast(query):
        lse, p = _softmax(query.to(exact) @ key.mT * scale, attended)
        return (p @ value).to(query.dtype), lse


def plain_merge(
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    coarse: CoarseKeys,
    selected: Tensor,
    scale: float,
    together: int = 1,
) -> tuple[Tensor, Tensor]:
    """``merge_coarse_keys``, with the samples' heads in one dim.

    Args:
        query: ``(H, S, D)``.
        output: ``(H, S, value dim)``, attention over the chosen groups.
        lse: ``(H, S)``, its log-sum-exp; -inf where a query chose nothing.
        coarse: keys of the groups that were not chosen.
        selected: bool ``(H, rows, G)``: which groups each ``together`` queries chose.
        scale: factor on the scores.
        together: queries to a row of ``selected``.

    Returns:
        ``(H, S, value dim)`` and ``(H, S)``.
    """
    exact, repeats = accumulator(query), len(query) // len(coarse.key)
    key, value = (x.repeat_interleave(repeats, 0).to(exact) for x in (coarse.key, coarse.value))
    skipped = ~selected.repeat_interleave(together, 1)[:, : query.shape[1]][..., coarse.group]
    with without_autocast(query):
        scores = query.to(exact) @ key.mT * scale + coarse.bias.to(exact)
        # What was attended so far is one more key, whose value is the output.
        present = (lse != -torch.inf)[..., None]
        scores = torch.cat([lse.to(exact)[..., None].masked_fill(~present, 0), scores], -1)
        whole, p = _softmax(scores, torch.cat([present, skipped], -1))
        merged = p[..., :1] * output.to(exact) + p[..., 1:] @ value
    return merged.to(output.dtype), whole


def _softmax(scores: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the softmax of what is attended; derivatives stay finite in rows where nothing is."""
    nothing = ~attended.any(-1, keepdim=True)
    scores = scores.masked_fill(~attended, -torch.inf).masked_fill(nothing, 0)
    lse = scores.logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)
    return lse, scores.softmax(-1).masked_fill(~attended, 0)
