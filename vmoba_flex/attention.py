"""The public attention call: checks, chooses blocks, dispatches."""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.inputs import (
    check_choice,
    check_positive,
    check_query_key,
    check_scale,
    check_value,
    under_autocast,
)
from vmoba_flex.mask import selection_tiles
from vmoba_flex.packed import packed_attention
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection import choose_blocks
from vmoba_flex.tiles import tiles_attention

DISPATCHES = ("auto", "tiles", "packed", "dense")
BACKENDS = ("auto", "triton", "flash")


class AttentionStats(NamedTuple):
    """What a call attended, per sample and head; tensors ``(B, H)`` on the inputs' device.

    Attributes:
        density: float32, ``pairs / (video tokens * N)``.
        tile_density: float32, the share of 128 x 128 tiles, in block order, with at least one attended pair: what the
            dispatch ``"tiles"`` runs.
        pairs: int64, chosen (query, block) pairs.
    """

    density: Tensor
    tile_density: Tensor
    pairs: Tensor


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: Literal[False] = False,
    max_row_bytes: int = 2**31,
) -> Tensor: ...


@overload
def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: Literal[True],
    max_row_bytes: int = 2**31,
) -> tuple[Tensor, AttentionStats]: ...


def vmoba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dispatch: str = "auto",
    backend: str = "auto",
    return_stats: bool = False,
    max_row_bytes: int = 2**31,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """VMoBA attention (arXiv 2506.23858), raster order in and out, differentiable in query, key and value.

    Softmax attention of each video query over exactly the keys of the blocks that ``rule`` chose for it, and over
    prefix and suffix; prefix and suffix queries attend everything. Nothing is read back to the host, but for one number
    by ``"packed"`` where the rule does not bound its pairs.

    On a GPU the attention is compiled FlexAttention. On a CPU it is FlexAttention inside ``torch.compile`` without
    gradients, and otherwise a slower exact path that costs as much as full attention.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA. Under autocast all three are cast first.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks; ``S`` is its ``num_tokens``.
        rule: ``TopK`` or ``Threshold``.
        scale: factor on the scores before the softmax; ``1 / sqrt(D)`` by default. The choice of blocks ignores it.
        enable_gqa: allow fewer key heads than query heads; query head h uses key head ``h // (H // key heads)``.
        dispatch: ``"tiles"`` skips the tiles that no query of theirs wants. ``"packed"`` gathers the queries of each
            block, so that its cost is the density whatever neighbouring queries choose; see ``packed``. ``"dense"`` is
            full attention, which ignores ``rule``. ``"auto"`` is ``"tiles"``.
        backend: the kernels of FlexAttention on a GPU: ``"triton"``, or ``"auto"``, which is the same.
        return_stats: also return ``AttentionStats``.
        max_row_bytes: for ``"packed"``, the size of the queries gathered at a time, a few heads of them and at least
            one; about five times as much is held at the peak. Pools that span heads gather all heads at once.

    Returns:
        The output ``(B, H, S, value dim)``, or the output and ``AttentionStats``.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or the selection has 2**31 entries or more.

    Example:
        >>> import torch
        >>> from vmoba_flex import BlockPartition, Threshold, vmoba_attention
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 16)
        >>> partition = BlockPartition.spatiotemporal((4, 8, 8), (2, 4, 4))
        >>> out, stats = vmoba_attention(q, k, v, partition, Threshold(0.25), return_stats=True)
        >>> out.shape, stats.density.shape
        (torch.Size([1, 2, 256, 16]), torch.Size([1, 2]))
    """
    check_choice("dispatch", dispatch, DISPATCHES)
    check_choice("backend", backend, BACKENDS)
    query, key, value = under_autocast(query, key, value)
    check_query_key(query, key, partition, rule)
    check_value(value, query, key)
    check_scale(scale)
    check_positive("max_row_bytes", max_row_bytes)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} heads"
        )
    if backend != "auto" and not query.is_cuda:
        raise ValueError(f"backend must be 'auto' on device {query.device}, got {backend!r}")
    if dispatch == "dense":
        output = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
        return (output, _dense_stats(query, partition)) if return_stats else output
    selection = choose_blocks(query, key, partition, rule)
    if dispatch == "packed":
        kernels = _row_backend(backend, query, value)
        output = packed_attention(query, key, value, selection, partition, rule, scale, kernels, max_row_bytes)
    else:
        output = tiles_attention(query, key, value, selection, partition, scale, enable_gqa)
    return (output, _stats(selection, partition)) if return_stats else output


def _row_backend(backend: str, query: Tensor, value: Tensor) -> str:
    """What ``attend_packed`` runs on."""
    if not query.is_cuda or query.dtype == torch.float64:
        return "eager"
    if backend == "triton":
        return "triton"
    refusal = flash_refusal(query.device.index, query.dtype, query.shape[-1], value.shape[-1])
    if backend == "flash" and refusal:
        raise ValueError(f"backend must be one that can run, got 'flash': {refusal}")
    return "triton" if refusal else "flash"


@torch.compiler.assume_constant_result
def flash_refusal(device: int, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """``block_masks.flash.refusal``; a constant to ``torch.compile``."""
    from block_masks import flash

    return flash.refusal(device, dtype, head_dim, value_dim)


def _stats(selection: Tensor, partition: BlockPartition) -> AttentionStats:
    pairs = selection.sum((-2, -1))
    tiles = selection_tiles(selection, partition, "block").some
    return AttentionStats(pairs / selection[0, 0].numel(), tiles.float().mean((-2, -1)), pairs)


def _dense_stats(query: Tensor, partition: BlockPartition) -> AttentionStats:
    ones = torch.ones(query.shape[:2], device=query.device)
    pairs = partition.num_video_tokens * partition.num_blocks
    return AttentionStats(ones, ones.clone(), torch.full_like(ones, pairs, dtype=torch.int64))
