"""Query and key -> the log-sum-exp of each query's scores over the keys of each block: exact masses, without values.

B batch, H heads, S tokens, N blocks, D head dim; G groups of keys: the blocks, then prefix and suffix as one.
"""

import functools
import logging
import math

import torch
from torch import Tensor

from block_masks.launching.device import on_device
from block_masks.precision import accumulator, without_autocast
from vmoba_flex.groups import group_sizes
from vmoba_flex.inputs import check_query_key, check_scale, check_text_lengths, scale_of, under_autocast
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import reach
from vmoba_flex.selection.gate import num_blocks

_LOG = logging.getLogger(__name__)
_KERNEL_MAX_DIM = {2: 256, 4: 128}  # by bytes of a number
_CHUNK_SCORES = 2**26  # in memory at a time: 256 MiB in float32


def block_masses(
    query: Tensor,
    key: Tensor,
    partition: BlockPartition,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
) -> Tensor:
    """The share of each video query's full attention, causal if the partition is, that falls on each block.

    One pass over the products of queries and keys, half of those of full attention, in 0.7 of its time on an H200. No S
    x S tensor is made, and nothing is read back to the host. What a query's shares lack to 1 is on prefix and suffix.
    No gradient flows.

    Args:
        query: ``(B, H, S, D)`` in raster order, prefix and suffix included; floating point. Under autocast both tensors
            are cast first, as in ``vmoba_attention``.
        key: ``(B, key heads, S, D)``; where it has fewer heads, query head h uses key head ``h // (H // key heads)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        scale: factor on the scores before the softmax; ``1 / sqrt(D)`` by default.
        text_lengths: as in ``vmoba_attention``.

    Returns:
        ``(B, H, video tokens, N)`` in raster order; block by block in memory, so not contiguous. In float16 for float16
        and bfloat16 inputs, because it holds shares to 1 in 2,048 where bfloat16 holds them to 1 in 256; shares below
        3e-8 are 0. In float32 and float64 for inputs of these dtypes.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the result has 2**31 entries or more.

    Example:
        >>> from vmoba_flex import BlockPartition, block_masses
        >>> q, k = torch.randn(2, 1, 2, 4 * 8 * 8, 16)
        >>> masses = block_masses(q, k, BlockPartition.spatial((4, 8, 8), (4, 4)))
        >>> masses.shape, torch.allclose(masses.sum(-1), torch.ones(1))
        (torch.Size([1, 2, 256, 4]), True)
    """
    query, key = under_autocast(query, key)
    partition = check_query_key(query, key, partition, None)
    check_text_lengths(text_lengths, query, partition)
    scale = scale_of(check_scale(scale), query)
    return _block_masses(query.detach(), key.detach(), partition.flat, scale, text_lengths)


@torch.no_grad()
def exact_gate(query: Tensor, key: Tensor, partition: BlockPartition, queries: Queries | None = None) -> Tensor:
    """The log-sum-exp of each video query's scores, times ``1 / sqrt(D)``, over the keys of each block.

    Args:
        query: ``(B, H, S, D)`` in raster order, with prefix and suffix.
        key: ``(B, key heads, S, D)``; query head h uses key head ``h // (H // key heads)``.
        partition: the blocks.
        queries: those of ``query``; None for all.

    Returns:
        ``(B, H, video queries, N)``, float32, or float64 for float64 inputs; block by block in memory.
    """
    before, _, video, _ = Queries.of(partition) if queries is None else queries
    return _exact_gate(query, key, partition.flat, before, video)


# Opaque to Inductor, as the other gates are.
@torch.library.custom_op("vmoba_flex::exact_gate", mutates_args=())
@on_device
def _exact_gate(query: Tensor, key: Tensor, sizes: list[int], before: int, count: int) -> Tensor:
    partition, scale = BlockPartition.of_flat(sizes), 1 / math.sqrt(query.shape[-1])
    return group_lse(query, key, partition, before, count, scale, partition.num_blocks).mT


@_exact_gate.register_fake
def _(query: Tensor, key: Tensor, sizes: list[int], before: int, count: int) -> Tensor:
    shape = (*query.shape[:2], num_blocks(sizes), count)
    return query.new_empty(shape, dtype=accumulator(query)).mT


@torch.library.custom_op("vmoba_flex::block_masses", mutates_args=())
@on_device
def _block_masses(query: Tensor, key: Tensor, sizes: list[int], scale: float, text_lengths: Tensor | None) -> Tensor:
    partition = BlockPartition.of_flat(sizes)
    groups, count = len(group_sizes(partition)), partition.num_video_tokens
    lse = group_lse(query, key, partition, partition.prefix, count, scale, groups, text_lengths)
    if partition.causal_frames is not None:
        lse[:, :, : partition.num_blocks].masked_fill_(~reach(partition, query.device).mT, -torch.inf)
    shares = (lse[:, :, : partition.num_blocks] - lse.logsumexp(2, keepdim=True)).exp_()
    return shares.to(_masses_dtype(query)).mT


@_block_masses.register_fake
def _(query: Tensor, key: Tensor, sizes: list[int], scale: float, text_lengths: Tensor | None) -> Tensor:
    shape = (*query.shape[:2], num_blocks(sizes), math.prod(sizes[:3]))
    return query.new_empty(shape, dtype=_masses_dtype(query)).mT


def group_lse(
    query: Tensor, key: Tensor, partition: BlockPartition, before: int, count: int, scale: float, groups: int,
    text_lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The natural log-sum-exp of scaled scores over each of the first ``groups`` groups.

    Args:
        query: ``(B, H, queries, D)`` in raster order.
        key: ``(B, key heads, S, D)`` in raster order.
        partition: the blocks.
        before: queries before the first that is scored.
        count: queries that are scored.
        scale: factor on the scores.
        groups: N, or N + 1 with prefix and suffix.
        text_lengths: int64 ``(B,)``, the number of valid prefix and suffix tokens; all if None.

    Returns:
        float32 or float64 ``(B, H, groups, count)``; -inf for a group without valid keys.
    """
    if query.is_cuda and count:
        if query.shape[-1] <= _KERNEL_MAX_DIM.get(query.element_size(), 0):
            from vmoba_flex.selection import exact_kernels

            return exact_kernels.group_lse(query, key, partition, before, count, scale, groups, text_lengths)
        _log_eager(query.dtype, query.shape[-1])
    (batch, heads, _, _), sizes = query.shape, group_sizes(partition)[:groups]
    ordered = partition.to_block_order(key)
    first, end = partition.prefix, partition.prefix + partition.num_video_tokens
    ordered = torch.cat([ordered[:, :, first:end], ordered[:, :, :first], ordered[:, :, end:]], 2)[:, :, : sum(sizes)]
    ordered = ordered.repeat_interleave(heads // key.shape[1], 1).to(accumulator(query))
    valid = None
    if text_lengths is not None:
        place = torch.arange(sum(sizes), device=query.device)
        valid = place < (partition.num_video_tokens + text_lengths)[:, None, None, None]
    lse = torch.empty(batch, heads, groups, count, dtype=ordered.dtype, device=query.device)
    rows = max(1, _CHUNK_SCORES // (batch * heads * sum(sizes)))
    for chunk in range(0, count, rows):
        part = query[:, :, before + chunk : before + min(chunk + rows, count)].to(ordered.dtype)
        with without_autocast(query):
            scores = part @ ordered.mT * scale
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        of_groups = [score.logsumexp(-1) for score in scores.split(sizes, -1)]
        lse[..., chunk : chunk + rows] = torch.stack(of_groups, 2)
    return lse


@functools.cache
def _log_eager(dtype: torch.dtype, dim: int) -> None:
    """Logs once for each kind of inputs."""
    _LOG.warning(
        "exact masses are made in plain PyTorch, which is slow: the kernel takes 16 bit with head dims up to 256 and "
        "float32 with up to 128, got %s and %d", dtype, dim,
    )  # fmt: skip


def _masses_dtype(query: Tensor) -> torch.dtype:
    return torch.float16 if query.element_size() == 2 else query.dtype
