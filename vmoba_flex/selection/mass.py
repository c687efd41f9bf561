"""A gate's scores -> attention masses, which ``normalize="softmax"`` ranks and sums."""

import math

import torch
from torch import Tensor

from block_masks.launching.device import on_device
from vmoba_flex.partition import BlockPartition


def block_mass(scores: Tensor, partition: BlockPartition, head_dim: int) -> Tensor:
    """A softmax of the gate "mean" over blocks, each weighted by its number of tokens.

    ``size_n exp(score_n / sqrt(head_dim)) / sum_m size_m exp(score_m / sqrt(head_dim))``: the attention mass on block n
    if all keys of a block were its mean. All of a query's are NaN where one of its scores is NaN or infinite.

    Args:
        scores: what ``gate`` returns, ``(B, H, queries, N)``.
        partition: the blocks.
        head_dim: of the queries that made the scores.

    Returns:
        Like ``scores``, in 0..1; block by block in memory.
    """
    return _block_mass(scores, partition.block_sizes(scores.device), 1 / math.sqrt(head_dim))


def log_mass(scores: Tensor) -> Tensor:
    """A softmax over blocks of scores that are logarithms of masses, as all gates but "mean" give them.

    All masses of a query are NaN where one of its scores is NaN or infinite.

    Args:
        scores: ``(B, H, queries, N)``.

    Returns:
        Like ``scores``, in 0..1; block by block in memory.
    """
    return _block_mass(scores, None, 1.0)


# Opaque to Inductor, like the gate.
@torch.library.custom_op("vmoba_flex::block_mass", mutates_args=())
@on_device
def _block_mass(scores: Tensor, sizes: Tensor | None, scale: float) -> Tensor:
    logits = scores.mT * scale
    if sizes is not None:
        logits += sizes.to(logits.dtype).log()[:, None]
    bad = ~logits.isfinite().all(-2, keepdim=True)
    return logits.softmax(-2).masked_fill_(bad, torch.nan).contiguous().mT


@_block_mass.register_fake
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.mT.shape).mT
