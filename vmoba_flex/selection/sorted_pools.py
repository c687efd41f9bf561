"""Scores of pools of any length -> the pairs taken, by a sort in plain PyTorch, which runs everywhere."""

import torch
from torch import Tensor

from vmoba_flex.selection.weights import Targets, rest_to_reach, scaled_weights


def take_sorted(scores: Tensor, own: Tensor, targets: Targets) -> Tensor:
    """Own pairs and the best others of each pool, up to the first target that is reached.

    A pair is taken exactly if the pairs before it fall short of every target.

    Args:
        scores: floating ``(pools, entries)``, entries in the order that breaks ties.
        own: bool ``(own pools, entries)``; pool p has row ``p % own pools``.
        targets: what to keep.

    Returns:
        bool ``(pools, entries)``.
    """
    max_pairs, tau, stretch = targets
    own = own.repeat(scores.shape[0] // own.shape[0], 1)
    # Sorts may tell apart the two zeros, and NaNs with either sign, which must tie.
    scores = torch.where(scores.isnan(), torch.nan, torch.where(scores == 0, 0.0, scores))
    rank = scores.argsort(dim=-1, descending=True, stable=True)
    others = (~own).gather(-1, rank)
    taken = others
    if max_pairs is not None:
        taken = taken & (_before(others.long()) < max_pairs - own.sum(-1, keepdim=True))
    if tau is not None:
        least, most = scores.aminmax(dim=-1, keepdim=True)
        weights, finite = scaled_weights(scores, least, most, scores.shape[-1], stretch)
        total, of_own = weights.sum(-1, keepdim=True), (own * weights).sum(-1, keepdim=True)
        rest = rest_to_reach(total, of_own, finite, tau, scores.shape[-1])
        taken = taken & (_before(others * weights.gather(-1, rank)) < rest)
    return own | torch.zeros_like(own).scatter(-1, rank, taken)


def _before(weights: Tensor) -> Tensor:
    """Sum of what stands before each entry of the last dim."""
    return weights.cumsum(-1) - weights
