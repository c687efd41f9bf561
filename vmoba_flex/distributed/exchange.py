"""Tokens of all heads for heads of all tokens, and back."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from vmoba_flex.distributed.collectives import Ranks, all_to_all
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

    @property
    def even(self) -> int | None:
        """The length of all runs where each rank has one of its own, and all are equally long."""
        length = self.own[0][0][1] if self.own[0] else 0
        even = self.own == self.runs and {tuple(lengths(runs)) for runs in self.own} == {(length,)}
        return length if even else None


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
    """Gives each rank all tokens of its heads; differentiable.

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
    ranks, batch = layout.ranks, tensors[0].shape[0]
    tokens = [sum(lengths(runs)) for runs in layout.own]
    # Replicated tokens stay: of this rank's heads they are here.
    before = sum([length for start, length in layout.here if start < layout.own[ranks.rank][0][0]])
    mine = []
    for x, one in zip(tensors, heads, strict=True):
        y = x.transpose(0, 1)
        mine.append(y if one.order is None else reorder(y, one.order, one.order.argsort(), 0))
    leaving = [
        y[sum(one.counts[:rank]) : sum(one.counts[: rank + 1]), :, before : before + tokens[ranks.rank]]
        for rank in range(ranks.size)
        for y, one in zip(mine, heads, strict=True)
    ]
    if len({x.shape[3] for x in tensors}) > 1:
        leaving = [piece.reshape(-1) for piece in leaving]
    rows = [
        [one.counts[rank] * x.shape[3] * batch for x, one in zip(tensors, heads, strict=True)]
        for rank in range(ranks.size)
    ]
    sent = [sum(each) * tokens[ranks.rank] for each in rows]
    here = rows[ranks.rank]
    received = [sum(here) * each for each in tokens]
    arrived = all_to_all(torch.cat(leaving).view(-1), received, sent, ranks)
    shapes = [(one.counts[ranks.rank], batch, x.shape[3]) for x, one in zip(tensors, heads, strict=True)]
    if layout.even is not None:
        parts = arrived.view(ranks.size, -1).split([each * layout.even for each in here], 1)
        return [
            part.view(ranks.size, count, batch, layout.even, dim).permute(2, 1, 0, 3, 4).reshape(batch, count, -1, dim)
            for part, (count, batch, dim) in zip(parts, shapes, strict=True)
        ]
    parts = arrived.split([row * each for each in tokens for row in here])
    results = []
    for index, (y, one, (count, batch, dim)) in enumerate(zip(mine, heads, shapes, strict=True)):
        from_rank = [
            part.view(count, batch, each, dim).transpose(0, 1)
            for part, each in zip(parts[index :: len(tensors)], tokens, strict=True)
        ]
        video = [from_rank[rank][:, :, start : start + each] for rank, start, each in in_order(layout.own)]
        first = sum(one.counts[: ranks.rank])
        text = y[first : first + count].transpose(0, 1)
        results.append(torch.cat([text[:, :, :before], *video, text[:, :, before + tokens[ranks.rank] :]], 2))
    return results


def to_tokens(x: Tensor, layout: Layout, heads: Heads) -> Tensor:
    """The way back: gives each rank all heads of its tokens; differentiable.

    Args:
        x: ``(B, heads of this rank, S, D)``.
        layout: which tokens each rank holds. Replicated ones go to every rank.
        heads: which heads each rank attends.

    Returns:
        ``(B, H, tokens of this rank, D)``.
    """
    batch, count, _, dim = x.shape
    ranks, x = layout.ranks, x.transpose(0, 1)
    if layout.even is not None:
        leaving = x.unflatten(2, (ranks.size, layout.even)).movedim(2, 0).reshape(-1)
    else:
        of_rank = [[x[:, :, start : start + length] for start, length in runs] for runs in layout.runs]
        leaving = torch.cat([(torch.cat(runs, 2) if len(runs) > 1 else runs[0]).reshape(-1) for runs in of_rank])
    here = layout.tokens
    sent = [count * batch * sum(lengths(runs)) * dim for runs in layout.runs]
    received = [each * batch * here * dim for each in heads.counts]
    arrived = all_to_all(leaving, received, sent, ranks).view(-1, batch, here, dim)
    if heads.order is not None:
        arrived = reorder(arrived, heads.order.argsort(), heads.order, 0)
    return arrived.transpose(0, 1)
