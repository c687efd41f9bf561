"""Which rank attends which heads, so that ranks work alike: heads differ in density.

H heads.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoba_flex.checks import check_positive
from vmoba_flex.collectives import Ranks, all_reduce
from vmoba_flex.distributed.shards import split_evenly

# The weight of one call in the running estimate of a head's density.
_NEWEST = 0.1


class Imbalance(NamedTuple):
    """The work of the busiest rank over the mean: 1 where all ranks work alike.

    Work is counted in attended pairs, which the cost of exact dispatches follows.

    Attributes:
        before: with the heads as they were assigned.
        after: with the heads as they are now.
    """

    before: float
    after: float


class HeadBalance:
    """The heads that each rank attends in one layer, and a running estimate of their densities.

    Pass it to each call of the layer, as ``vmoba_attention(..., group=RankGroup(group, balance=balance))``, and call
    ``assign`` now and then. Outputs do not depend on the assignment. Ranks keep their number of heads, so no shape
    changes and nothing is compiled again; heads are permuted inside the exchange, which sends no more than before.

    Args:
        heads: key heads of the calls, which take their query heads with them. With fewer key heads than ranks, the
            query heads.
        group: of the calls.
        device: of the calls; torch's default device if None.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there are fewer heads than ranks.
    """

    def __init__(self, heads: int, group: Any, device: torch.device | str | None = None) -> None:
        check_positive("heads", heads)
        self.ranks = Ranks.of(group)
        if heads < self.ranks.size:
            raise ValueError(f"heads must be at least the number of ranks, {self.ranks.size}, got {heads}")
        self.order = torch.arange(heads, device=device)
        self.density = torch.zeros(heads, dtype=torch.float32, device=device)
        self.calls = torch.zeros(heads, dtype=torch.float32, device=device)

    def order_of(self, heads: int) -> Tensor:
        """The heads of rank 0, of rank 1 and so on, int64.

        Raises:
            ValueError: if a call has another number of heads.
        """
        if heads != len(self.order):
            raise ValueError(f"balance must be made for the {heads} heads of the call, got one for {len(self.order)}")
        return self.order

    def record(self, density: Tensor, heads: Tensor) -> None:
        """Adds the densities of a call to the estimate, without a host read.

        Args:
            density: float32 ``(heads of this rank,)``.
            heads: int64 ``(heads of this rank,)``, their indices.
        """
        with torch.no_grad():
            _record(self.density, self.calls, density, heads)

    def assign(self) -> Imbalance:
        """Assigns heads so that ranks have about the same work; all ranks call this. Reads the device.

        Raises:
            ValueError: if no call has been recorded.
        """
        counts = [count for _, count in split_evenly(0, len(self.order), self.ranks.size)]
        first = sum(counts[: self.ranks.rank])
        mine = self.order[first : first + counts[self.ranks.rank]]
        known = torch.zeros_like(self.density).index_copy(0, mine, (self.density / self.calls)[mine])
        known = all_reduce(known, "sum", self.ranks.group)
        work = known.tolist()
        if any(math.isnan(one) for one in work):
            raise ValueError("balance must have recorded a call before heads are assigned, got none")
        self.density.copy_(known)
        self.calls.fill_(1)
        order = self.order.tolist()
        now = [order[start : start + count] for start, count in split_evenly(0, len(order), self.ranks.size)]
        before = _imbalance(now, work)
        better = min(now, share_out(work, counts), key=lambda heads: _imbalance(heads, work))
        self.order.copy_(torch.tensor([head for heads in better for head in heads]))
        return Imbalance(before, _imbalance(better, work))


def share_out(work: list[float], counts: list[int]) -> list[list[int]]:
    """Heads for each rank, ``counts`` of them: the most work first, each to the rank that has the least so far."""
    heads: list[list[int]] = [[] for _ in counts]
    load = [0.0] * len(counts)
    for head in sorted(range(len(work)), key=lambda head: (-work[head], head)):
        free = [rank for rank, count in enumerate(counts) if len(heads[rank]) < count]
        rank = min(free, key=lambda rank: (load[rank], rank))
        heads[rank].append(head)
        load[rank] += work[head]
    return [sorted(one) for one in heads]


def _imbalance(heads: list[list[int]], work: list[float]) -> float:
    loads = [sum(work[head] for head in one) for one in heads]
    return max(loads) * len(loads) / sum(loads)


# Opaque, so that no graph keeps the estimate for backward.
@torch.library.custom_op("vmoba_flex::record_heads", mutates_args=("density", "calls"))
def _record(density: Tensor, calls: Tensor, newest: Tensor, heads: Tensor) -> None:
    # Both start at 0, so their quotient is an unbiased estimate from the first call on.
    for estimate, value in ((density, newest), (calls, torch.ones_like(newest))):
        estimate.index_copy_(0, heads, estimate[heads].lerp(value, _NEWEST))


@_record.register_fake
def _(density: Tensor, calls: Tensor, newest: Tensor, heads: Tensor) -> None:
    return None
