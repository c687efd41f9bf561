"""Scores of pools that span ranks -> the best pairs of each pool; no score leaves its rank.

Entries rank by score, and equal scores by their place in the pool, so that no two entries tie. The last entry to take,
the cutoff, is found digit by digit: ranks add up the number and the weight of the entries that have each value of a
digit, among those that agree with the cutoff in the digits before. These sums are integers, so the choice equals a
single process's, to the bit. Nothing is read back to the host.
"""

import torch
from torch import Tensor

from vmoba_flex.collectives import all_reduce
from vmoba_flex.selection.weights import Targets, rest_to_reach, scaled_weights

_BITS = 8
_DIGITS = 2**_BITS


def take_across(
    scores: Tensor,
    own: Tensor,
    place: Tensor,
    length: int,
    targets: Targets,
    group: str,
) -> Tensor:
    """Own pairs and the best others of each whole pool, up to the first target that is reached.

    All ranks of the group call this, with the same number of pools.

    Args:
        scores: floating ``(pools, entries)``: the entries of each pool on this rank, possibly none.
        own: bool ``(own pools, entries)``; pool p has row ``p % own pools``.
        place: int64 ``(entries,)``: the index of each entry in its pool, in the order that breaks ties.
        length: entries of a whole pool.
        targets: what to keep of a whole pool.
        group: name of the process group.

    Returns:
        bool ``(pools, entries)``.
    """
    own = own.repeat(scores.shape[0] // own.shape[0], 1)
    weights, caps = _caps(scores, own, length, targets, group)
    descent = _Descent(~own, weights, caps, group)
    key, bits = _ordered(scores)
    descent.follow(key, bits)
    width = (length - 1).bit_length()
    descent.follow((2**width - 1 - place).expand_as(key), width)  # the earlier ranks higher
    return own | descent.above | descent.level


class _Descent:
    """The digits of the cutoff, found from the top, in all pools at once.

    Attributes:
        above: bool ``(pools, entries)``: entries above the cutoff in the digits so far.
        level: bool ``(pools, entries)``: entries that agree with the cutoff in all digits so far.
        reached: int64 ``(pools, targets)``: what the entries above sum to, over all ranks.
    """

    def __init__(self, others: Tensor, weights: list[Tensor | None], caps: Tensor, group: str) -> None:
        self.weights, self.caps, self.group = weights, caps, group
        self.above, self.level = torch.zeros_like(others), others
        self.reached = torch.zeros_like(caps)

    def follow(self, key: Tensor, bits: int) -> None:
        """Finds ``bits`` more bits of the cutoff; ``key``: int64 ``(pools, entries)``, the higher the better."""
        for shift in reversed(range(0, bits, _BITS)):
            digit = (key >> shift) & (_DIGITS - 1)
            sums = torch.stack([self._histogram(digit, weight) for weight in self.weights], 1)
            sums = all_reduce(sums, "sum", self.group)
            higher = sums.flip(-1).cumsum(-1).flip(-1) - sums + self.reached[..., None]
            # An entry is taken if the entries above it fall short of every target. This holds from the top down to the
            # digit of the cutoff, and for no digit if nothing is to be taken.
            holds = (higher < self.caps[..., None]).all(1)
            last = _DIGITS - holds.sum(-1, keepdim=True)
            at = last.clamp(max=_DIGITS - 1)
            self.reached = higher.gather(-1, at[:, None].expand(-1, higher.shape[1], -1)).squeeze(-1)
            self.above = self.above | (self.level & (digit > last))
            self.level = self.level & (digit == last)

    def _histogram(self, digit: Tensor, weight: Tensor | None) -> Tensor:
        values = self.level.long() if weight is None else weight * self.level
        return torch.zeros(len(digit), _DIGITS, dtype=torch.int64, device=digit.device).scatter_add_(1, digit, values)


def _caps(scores: Tensor, own: Tensor, length: int, targets: Targets, group: str) -> tuple[list[Tensor | None], Tensor]:
    """For each target its weights, None for 1 each, and the sum that non-own pairs must reach ``(pools, targets)``."""
    max_pairs, tau, stretch = targets
    weights: list[Tensor | None] = []
    caps = []
    finite, parts = None, [own.sum(-1)]
    weight = None
    if tau is not None:
        # Not every backend's maximum keeps a NaN. All keep an infinity, which has the same effect here.
        ends = torch.full((2, len(scores)), -torch.inf, dtype=scores.dtype, device=scores.device)
        if scores.shape[1]:
            least, most = scores.aminmax(dim=-1)
            ends = torch.stack([-least, most])
            ends = torch.where(ends.isnan(), torch.inf, ends)
        ends = all_reduce(ends, "max", group)
        weight, finite = scaled_weights(scores, -ends[0, :, None], ends[1, :, None], length, stretch)
        parts += [weight.sum(-1), (own * weight).sum(-1)]
    sums = all_reduce(torch.stack(parts, 1), "sum", group)
    if max_pairs is not None:
        weights.append(None)
        caps.append(max_pairs - sums[:, :1])
    if tau is not None:
        assert finite is not None
        weights.append(weight)
        caps.append(rest_to_reach(sums[:, 1:2], sums[:, 2:], finite, tau, length))
    return weights, torch.cat(caps, 1)


def _ordered(scores: Tensor) -> tuple[Tensor, int]:
    """Int64 keys whose bits, read as unsigned, order like the scores, and how many bits; NaNs are highest and tie."""
    scores = torch.where(scores.isnan(), torch.nan, torch.where(scores == 0, 0.0, scores))
    if scores.dtype == torch.float64:
        bits = scores.contiguous().view(torch.int64)
        return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max) ^ torch.iinfo(torch.int64).min, 64
    bits = scores.contiguous().view(torch.int32).long()
    return (bits ^ ((bits >> 63) & 0x7FFFFFFF)) + 2**31, 32
