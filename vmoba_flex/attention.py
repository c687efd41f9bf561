"""The public attention call: checks, chooses blocks, dispatches."""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vmoba_flex.chunked import chunked_attention
from vmoba_flex.compiled import compiled_flex_attention
from vmoba_flex.inputs import check_choice, check_query_key, check_scale, check_value
from vmoba_flex.mask import key_groups, selection_mask
from vmoba_flex.packed import packed_attention
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection import vmoba_selection

DISPATCHES = ("auto", "tiles", "packed", "dense")
BACKENDS = ("auto", "triton")


class AttentionStats(NamedTuple):
    """What a call attended, per sample and head; tensors ``(B, H)`` on the inputs' device.

    Attributes:
        density: float32, ``pairs / (video tokens * N)``.
        tile_density: float32, the share of 128 x 128 tiles with at least one attended pair: what FlexAttention runs.
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
    max_row_bytes: int = 2**29,
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
    max_row_bytes: int = 2**29,
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
    max_row_bytes: int = 2**29,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """VMoBA attention (arXiv 2506.23858), raster order in and out, differentiable in query, key and value.

    Softmax attention of each video query over exactly the keys of the blocks that ``rule`` chose for it, and over
    prefix and suffix; prefix and suffix queries attend everything. Nothing is read back to the host.

    On a GPU the attention is compiled FlexAttention. On a CPU it is FlexAttention inside ``torch.compile`` without
    gradients, and otherwise a slower exact path that costs as much as full attention.

    Args:
        query: ``(B, H, S, D)``, floating point, on CPU or CUDA.
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
    check_query_key(query, key, partition, rule)
    check_value(value, query, key)
    check_scale(scale)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} heads"
        )
    if dispatch == "dense":
        output = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
        return (output, _dense_stats(query, partition)) if return_stats else output
    selection = vmoba_selection(query, key, partition, rule)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if dispatch == "packed":
        output = packed_attention(query, key, value, selection, partition, rule, scale, max_row_bytes)
        mask = selection_mask(selection, partition, "block") if return_stats else None
    elif query.device.type == "cpu" and (needs_grad or not torch.compiler.is_compiling()):
        output = chunked_attention(query, key, value, *key_groups(selection, partition), scale)
        mask = selection_mask(selection, partition, "block") if return_stats else None
    else:
        mask = selection_mask(selection, partition, "block")
        query, key, value = (partition.to_block_order(x) for x in (query, key, value))
        output = partition.to_raster_order(
            compiled_flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
        )
    return output if mask is None or not return_stats else (output, _stats(selection, mask))


def _stats(selection: Tensor, mask: BlockMask) -> AttentionStats:
    pairs = selection.sum((-2, -1))
    assert mask.full_kv_num_blocks is not None  # block_masks makes all eight tensors
    tiles = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum(-1)
    rows, columns = mask.kv_indices.shape[-2:]
    return AttentionStats(pairs / selection[0, 0].numel(), tiles / (rows * columns), pairs)


def _dense_stats(query: Tensor, partition: BlockPartition) -> AttentionStats:
    ones = torch.ones(query.shape[:2], device=query.device)
    pairs = partition.num_video_tokens * partition.num_blocks
    return AttentionStats(ones, ones.clone(), torch.full_like(ones, pairs, dtype=torch.int64))
