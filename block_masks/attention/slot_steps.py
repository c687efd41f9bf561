"""The steps of attention of tiles of slots in plain PyTorch: for a CPU, and what the kernels are held to."""

import torch
from torch import Tensor

from block_masks.attention.row_steps import delta, share_left
from block_masks.plans.move_steps import take_slots

__all__ = ["attend_tiles", "attend_tiles_backward", "delta", "padding_lse", "remove_padding", "take_slots"]


def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, lists: list[Tensor], scale: float, tile_size: int
) -> tuple[Tensor, Tensor]:
    """Attention of each tile of queries over the keys of the tiles in its list.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, H, keys, D)``.
        value: ``(B, H, keys, value dim)``.
        lists: counts and lists of cut tiles, which must be none, and of whole ones; see ``tile_lists``.
        scale: factor on the scores.
        tile_size: queries and keys in a tile.

    Returns:
        The output ``(B, H, S, value dim)``, and the natural log-sum-exp ``(B, H, S)``, in float32 at least.
    """
    scores = _scores(query, key, scale).masked_fill(~_attended(lists, tile_size), -torch.inf)
    return (scores.softmax(-1) @ value.to(scores)).to(query.dtype), scores.logsumexp(-1)


def attend_tiles_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    transposed: list[Tensor], scale: float, tile_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients through ``attend_tiles``, from its output and log-sum-exp.

    Args:
        grad: like the output.
        query: as there.
        key: as there.
        value: as there.
        output: what came out.
        lse: likewise.
        transposed: like ``lists``, but of the tiles of queries that attend each tile of keys.
        scale: as there.
        tile_size: as there.

    Returns:
        Gradients of query, key and value.
    """
    exact = lse.dtype
    attended = _attended(transposed, tile_size).mT
    p = torch.where(attended, (_scores(query, key, scale) - lse[..., None]).exp(), 0)
    delta = (grad.to(exact) * output.to(exact)).sum(-1, keepdim=True)
    ds = p * (grad.to(exact) @ value.to(exact).mT - delta) * scale
    grads = ds @ key.to(exact), ds.mT @ query.to(exact), p.mT @ grad.to(exact)
    grad_query, grad_key, grad_value = (x.to(query.dtype) for x in grads)
    return grad_query, grad_key, grad_value


def padding_lse(
    query: Tensor, last_keys: Tensor, padding: Tensor, selected: Tensor, scale: float, together: int
) -> Tensor:
    """What padding slots weigh in the attention of each query, where each slot holds its group's last key.

    Args:
        query: ``(B, H, S, D)``.
        last_keys: the last key of each group, ``(B, key heads, G, D)``.
        padding: padding slots of each group, int32 ``(rows, G)``, for as many of the ``B * H`` heads each.
        selected: bool ``(B, H, rows, G)``: which groups were attended by each ``together`` queries.
        scale: factor on the scores.
        together: queries to a row of ``selected``.

    Returns:
        The natural log-sum-exp of their scores ``(B, H, S)``, in float32 at least; -inf where there are none.
    """
    last_keys = last_keys.repeat_interleave(query.shape[1] // last_keys.shape[1], 1)
    batch, heads = query.shape[:2]
    padding = padding.repeat_interleave(batch * heads // len(padding), 0).view(batch, heads, 1, -1)
    chosen = selected.repeat_interleave(together, 2)[:, :, : query.shape[2]] & (padding > 0)
    scores = _scores(query, last_keys, scale)
    scores += padding.clamp(min=1).to(scores.dtype).log()
    return scores.masked_fill(~chosen, -torch.inf).logsumexp(-1)


def remove_padding(output: Tensor, lse: Tensor, padding_lse: Tensor) -> Tensor:
    """Takes padding slots out of attention in which each one had a value of zero.

    Args:
        output: ``(B, H, S, value dim)``, padding slots included; contiguous. They are taken out in place.
        lse: ``(B, H, S)``, padding slots included; contiguous.
        padding_lse: ``(B, H, S)``, theirs; contiguous.

    Returns:
        The log-sum-exp without them.
    """
    left = share_left(lse, padding_lse)
    output /= left[..., None]
    return lse + left.log()


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.to(exact) @ key.to(exact).mT * scale


def _attended(lists: list[Tensor], tile_size: int) -> Tensor:
    """The pairs of listed tiles: bool ``(B, H, S, keys)``."""
    cut, _, counts, listed = lists
    assert not cut.any()
    listed_tiles = torch.arange(listed.shape[-1]) < counts[..., None]
    tiles = torch.zeros_like(listed_tiles).scatter_(-1, listed.long(), listed_tiles)
    return tiles.repeat_interleave(tile_size, -1).repeat_interleave(tile_size, -2)
