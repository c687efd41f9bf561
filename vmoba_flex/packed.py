"""Attention over packed rows: the cost of a selection is its density, whatever neighbouring queries choose."""

import math

import torch
from torch import Tensor

from block_masks import attend_packed
from block_masks.rows import TILE
from vmoba_flex.mask import group_sizes, key_groups
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule

# What backward holds for each row, in sizes of a query: queries, gradients of outputs and of queries; FlashAttention-4
# also wants the outputs, and adds up gradients of queries in float32.
_COPIES = {"eager": 3, "triton": 3, "flash": 6}


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    partition: BlockPartition,
    rule: Rule,
    scale: float | None,
    backend: str,
    max_row_bytes: int,
) -> Tensor:
    """Attention with a row per (query, chosen block), a few heads at a time; see ``block_masks.attend_packed``.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video tokens, N)``, made by ``rule``.
        partition: the blocks.
        rule: bounds the rows; a ``Threshold`` without ``max_density`` does not, and then one number is read from the
            device.
        scale: ``1 / sqrt(D)`` if None.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        max_row_bytes: what the rows of the heads worked on together may take, at least one head.

    Raises:
        ValueError: inside ``torch.compile``, if the rule does not bound the rows.
    """
    batch, heads, _, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    selected, key_group = key_groups(selection, partition)
    selected = selected.flatten(0, 1)
    row_bytes = _COPIES[backend] * max(head_dim, value.shape[-1]) * query.element_size()
    together, row_tiles = _head_group(selected, partition, rule, heads, max_row_bytes // row_bytes)
    output, _ = attend_packed(
        *(x.flatten(0, 1) for x in (query, key, value)), selected, key_group, group_sizes(partition),
        row_tiles=row_tiles, heads=together, scale=scale, backend=backend,
    )  # fmt: skip
    return output.unflatten(0, (batch, heads))


def _head_group(selected: Tensor, partition: BlockPartition, rule: Rule, heads: int, max_rows: int) -> tuple[int, int]:
    """How many heads go together, a divisor of ``heads``, and how many tiles of rows these may need."""
    together = max_row_tiles(partition, rule, heads, heads)
    if together is not None and rule.pool in ("block", "global"):
        # Such a pool bounds its heads together. Apart, any one of them may hold nearly all pairs.
        return heads, together
    each = max_row_tiles(partition, rule, heads, 1) or _read_row_tiles(selected)
    groups = [n for n in range(1, heads + 1) if heads % n == 0 and n * each * TILE <= max_rows]
    group = max(groups, default=1)
    return group, group * each


def max_row_tiles(partition: BlockPartition, rule: Rule, heads: int, group: int) -> int | None:
    """The most tiles of rows that ``group`` of a sample's ``heads`` can need; None if the rule has no cap."""
    tokens, blocks = partition.num_video_tokens, partition.num_blocks
    text = partition.prefix + partition.suffix
    # Entries of a pool, pools, and own pairs, which a pool keeps even beyond its cap.
    entries, pools, own = {
        "query": (blocks, group * tokens, 1),
        "head": (tokens * blocks, group, tokens),
        "block": (heads * tokens, blocks, max(group_sizes(partition)[:blocks]) * heads),
        "global": (heads * tokens * blocks, 1, heads * tokens),
    }[rule.pool]
    cap = rule.max_pairs(entries, blocks)
    if cap is None:
        return None
    pairs = min(pools * max(cap, own), group * tokens * blocks)
    groups = blocks + (text > 0)
    if text:
        pairs += group * (tokens + text * groups)
    return (pairs + group * groups * (TILE - 1)) // TILE


def _read_row_tiles(selected: Tensor) -> int:
    """The most tiles of rows that any head needs, read from the device and rounded up so that few sizes occur."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "rule must bound its pairs for dispatch='packed' inside torch.compile: give Threshold a max_density, "
            "or use TopK"
        )
    tiles = int(((selected.sum(1) + TILE - 1) // TILE).sum(1).max())
    step = 2 ** max(tiles.bit_length() - 3, 0)  # between powers of two, four sizes
    return -(-tiles // step) * step
