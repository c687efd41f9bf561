"""Scores -> a threshold's weights in int64 fixed point, and the weight to reach.

Integer sums are the same in any order, so that the choice does not depend on how one or several devices add up a pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """What is kept of each pool: own pairs, and of the others, best first, the fewest that reach a target.

    Attributes:
        max_pairs: the most pairs that a pool keeps, own ones included; None for no cap.
        tau: share of the pool's weights to reach; None for no target.
        stretch: whether the pool's minimum and maximum scale the scores to 0..1; if not, scores lie in 0..1 already.
    """

    max_pairs: int | None
    tau: float | None = None
    stretch: bool = True


def fraction_bits(length: int) -> int:
    """Fraction bits of a pool's weights: as many as keep the sum of its ``length`` entries below 2**62."""
    return 62 - length.bit_length()


def scaled_weights(scores: Tensor, least: Tensor, most: Tensor, length: int, stretch: bool) -> tuple[Tensor, Tensor]:
    """Weights of pairs.

    Args:
        scores: floating ``(pools, entries)``.
        least: ``(pools, 1)``, the smallest score of each pool.
        most: ``(pools, 1)``, the largest one. Either is NaN or infinite if the pool has such a score.
        length: entries of a whole pool, of which ``scores`` may be a part.
        stretch: as in ``Targets``.

    Returns:
        int64 ``(pools, entries)``, 0 in pools that are not finite; and bool ``(pools, 1)``, which pools are finite.
    """
    spread = most.double() - least.double()
    finite = spread.isfinite()
    low, unit = 0.0, 2.0 ** fraction_bits(length)
    if stretch:
        low, unit = least.double(), unit / torch.where(spread <= 1e-6, 1.0, spread)
    return torch.where(finite, (scores.double() - low) * unit, 0.0).long(), finite


def rest_to_reach(total: Tensor, of_own: Tensor, finite: Tensor, tau: float, length: int) -> Tensor:
    """The weight that the non-own pairs of a pool have to reach.

    Args:
        total: int64 ``(pools, 1)``, the sum of a pool's weights.
        of_own: int64 ``(pools, 1)``, the sum over its own pairs.
        finite: bool ``(pools, 1)``.
        tau: share of the total to reach.
        length: as in ``scaled_weights``.

    Returns:
        int64 ``(pools, 1)``: at most 0 if own pairs reach tau, and above any sum in pools that are not finite.
    """
    reach = tau * (total.double() + 1e-6 * 2.0 ** fraction_bits(length))
    return torch.where(finite, reach.ceil().long() - of_own, torch.iinfo(torch.int64).max)
