"""Tokens of all heads for heads of all tokens, and back."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vmoba_flex.collectives import Ranks, all_to_all
from vmoba_flex.distributed.shards import Run, TokenShards, cut_evenly, in_order, lengths
from vmoba_flex.partition import BlockPartition, reorder


class Layout(NamedTuple):
    """Which tokens each rank of a call holds.

    Attributes:
        ranks: that share the call.
        runs: of tokens, for each rank.
        own: the runs that no other rank has, for each rank.
    """

    ranks: Ranks
    runs: tuple[tuple[Run, ...], ...]
    own: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, ranks: Ranks, shards: TokenShards | None, partition: BlockPartition) -> Self:
        """The layout of a call; ``shards`` None for even shards of one sequence."""
        shards = shards or TokenShards()
        runs = shards.runs(partition, ranks.size)
        return cls(ranks, runs, shards.own_runs(partition, ranks.size))

    @property
    def here(self) -> tuple[Run, ...]:
        """The runs of this rank."""
        return self.runs[self.ranks.rank]

    @property
    def tokens(self) -> int:
        """How many this rank holds."""
        return sum(lengths(self.here))


class Heads(NamedTuple):
    """Which heads each rank attends.

    Attributes:
        counts: heads of each rank.
        order: int64, the heads of rank 0, of rank 1 and so on; None for 0, 1, 2, ...
    """

    counts: tuple[int, ...]
    order: Tensor | None = None

    @classmethod
    def evenly(cls, heads: int, ranks: int, order: Tensor | None = None) -> Self:
        """As even as can be, the first ranks one more."""
        return cls(tuple([count for _, count in cut_evenly(0, heads, ranks)]), order)

    def times(self, repeats: int) -> Self:
        """Each head as ``repeats`` neighbouring ones: the query heads that go with these key heads."""
        order = self.order
        if order is not None:
            order = (order[:, None] * repeats + torch.arange(repeats, device=order.device)).flatten()
        return type(self)(tuple([count * repeats for count in self.counts]), order)

    def of_rank(self, rank: int, device: torch.device) -> Tensor:
        """The heads of a rank, int64."""
        first = sum(self.counts[:rank])
        if self.order is not None:
            return self.order[first : first + self.counts[rank]]
        return torch.arange(first, first + self.counts[rank], device=device)


def to_heads(tensors: Sequence[Tensor], layout: Layout, heads: Sequence[Heads]) -> list[Tensor]:
    """Gives each rank all tokens of its heads; differentiable, once.

    All tensors go in one exchange. Of several, a compiler that sees other shapes on each rank may choose another order
    on each, and then they would wait for one another, or take one tensor for another.

    Args:
        tensors: each ``(B, its heads, tokens of this rank, its dim)``.
        layout: which tokens each rank holds.
        heads: for each tensor, which of its heads each rank attends. They may sum to a multiple of them where it is
            repeated: each rank can attend all heads.

    Returns:
        For each tensor ``(B, heads of this rank, S, its dim)``.
    """
    mine = [
        x if one.order is None else reorder(x, one.order, one.order.argsort(), 1)
        for x, one in zip(tensors, heads, strict=True)
    ]
    counts = tuple([one.counts for one in heads])
    rank = layout.ranks.rank
    own = sum(lengths(layout.own[rank]))
    if own == layout.tokens:  # numbers: torch.compile of torch 2.11 cannot compare the runs themselves
        return list(_ToHeads.apply(layout.ranks, layout.runs, counts, *mine))
    # Replicated tokens stay: of this rank's heads they are here.
    before = sum([length for start, length in layout.here if start < layout.own[rank][0][0]])
    behind = before + own
    runs = tuple([tuple([(start - before, length) for start, length in of_rank]) for of_rank in layout.own])
    video = _ToHeads.apply(layout.ranks, runs, counts, *[x[:, :, before:behind] for x in mine])
    text = [x.split(one, 1)[rank] for x, one in zip(mine, counts, strict=True)]
    return [torch.cat([x[:, :, :before], y, x[:, :, behind:]], 2) for x, y in zip(text, video, strict=True)]


def to_tokens(x: Tensor, layout: Layout, heads: Heads) -> Tensor:
    """The way back: gives each rank all heads of its tokens; differentiable, once.

    Args:
        x: ``(B, heads of this rank, S, D)``.
        layout: which tokens each rank holds. Replicated ones go to every rank.
        heads: which heads each rank attends.

    Returns:
        ``(B, H, tokens of this rank, D)``.
    """
    (x,) = _ToTokens.apply(layout.ranks, layout.runs, (heads.counts,), x)
    return x if heads.order is None else reorder(x, heads.order.argsort(), heads.order, 1)


# Runs of tokens and, for each tensor, heads: of each rank.
_Runs = tuple[tuple[Run, ...], ...]
_Counts = tuple[tuple[int, ...], ...]


class _ToHeads(torch.autograd.Function):
    """The exchange of ``to_heads``, whose gradient goes the way back in one exchange too.

    Autograd's own gradient of the slices that leave for each rank would write as many tensors of zeros, and add them
    up.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, runs: _Runs, counts: _Counts, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.where = ranks, runs, counts
        return _to_heads(ranks, runs, counts, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks, runs, counts = ctx.where
        return None, None, None, *_to_tokens(ranks, runs, counts, grads)


class _ToTokens(torch.autograd.Function):
    """The exchange of ``to_tokens``, likewise."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, runs: _Runs, counts: _Counts, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.where = ranks, runs, counts
        return _to_tokens(ranks, runs, counts, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks, runs, counts = ctx.where
        return None, None, None, *_to_heads(ranks, runs, counts, grads)


def _to_heads(ranks: Ranks, runs: _Runs, counts: _Counts, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tokens that several ranks hold are added up."""
    tokens = [sum(lengths(of_rank)) for of_rank in runs]
    by_rank = [x.transpose(0, 1).split(one) for x, one in zip(tensors, counts, strict=True)]
    leaving = [[pieces[rank] for pieces in by_rank] for rank in range(ranks.size)]
    shapes = [
        [(one[ranks.rank], x.shape[0], count, x.shape[3]) for x, one in zip(tensors, counts, strict=True)]
        for count in tokens
    ]
    _, arrived = _exchange(leaving, shapes, ranks)
    return tuple([_put(parts, runs) for parts in zip(*arrived, strict=True)])


def _to_tokens(ranks: Ranks, runs: _Runs, counts: _Counts, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    here = sum(lengths(runs[ranks.rank]))
    leaving = [[_cut(x.transpose(0, 1), of_rank) for x in tensors] for of_rank in runs]
    shapes = [
        [(one[rank], x.shape[0], here, x.shape[3]) for x, one in zip(tensors, counts, strict=True)]
        for rank in range(ranks.size)
    ]
    flat, arrived = _exchange(leaving, shapes, ranks)
    # One tensor lies as it should: the heads of rank 0, of rank 1 and so on.
    whole = [flat] if len(tensors) == 1 else [_cat(parts) for parts in zip(*arrived, strict=True)]
    shape = (-1, tensors[0].shape[0], here)
    return tuple([y.view(*shape, x.shape[3]).transpose(0, 1) for x, y in zip(tensors, whole, strict=True)])


def _exchange(
    leaving: list[list[Tensor]], shapes: list[list[tuple[int, int, int, int]]], ranks: Ranks
) -> tuple[Tensor, list[list[Tensor]]]:
    """What comes from each rank, flat and in those shapes, for what goes to each: a piece of each tensor."""
    sent = [sum([piece.numel() for piece in pieces]) for pieces in leaving]
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    pieces = [piece for of_rank in leaving for piece in of_rank]
    if all(piece.shape[1:] == pieces[0].shape[1:] for piece in pieces):  # one copy, whatever their strides
        flat = _cat(pieces).view(-1)
    else:
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
    arrived = all_to_all(flat, [sum(of_rank) for of_rank in sizes], sent, ranks)
    parts = iter(arrived.split([size for of_rank in sizes for size in of_rank]))
    return arrived, [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


def _cut(x: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """Runs of ``(heads, B, S, D)``, one behind another."""
    parts = [x.narrow(2, start, count) for start, count in runs]
    return _cat(parts, 2) if len(parts) > 1 else parts[0]


def _put(parts: Sequence[Tensor], runs: _Runs) -> Tensor:
    """``(B, heads, S, D)`` of each rank's ``(heads, B, its tokens, D)``; what several hold is added up."""
    by_start: dict[int, Tensor] = {}
    for start, rank, first, count in in_order(runs):
        piece = parts[rank].transpose(0, 1).narrow(2, first, count)
        by_start[start] = by_start[start] + piece if start in by_start else piece
    return _cat(list(by_start.values()), 2)


def _cat(parts: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """``torch.cat`` by 8 bytes at a time where they fit: of slices, 2 at a time take a GPU 2.5 times as long."""
    if torch.compiler.is_compiling():
        return torch.cat(parts, dim)
    entries = 8 // parts[0].element_size()
    for x in parts:
        if x.stride(-1) != 1 or any(n % entries for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])):
            return torch.cat(parts, dim)
    return torch.cat([x.view(torch.int64) for x in parts], dim).view(parts[0].dtype)
