"""Attention over packed rows: the cost of a selection is its density, whatever neighbouring queries choose."""

import math

import torch
from torch import Tensor

from block_masks.attention.row_attention import Room, attend_rows
from block_masks.plans.rows import TILE
from vmoba_flex.call import Call, ChosenBackend
from vmoba_flex.groups import block_slots, group_sizes, valid_group_lengths, with_text
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule

# What forward and backward hold of a section of heads, in copies of its rows. Forward: outputs; FlashAttention-4 also
# wants the queries gathered. Backward: queries, gradients of outputs and of queries; FlashAttention-4 also gradients of
# queries in float32.
_COPIES = {"eager": (1, 3), "triton": (1, 3), "flash": (2, 5)}


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    call: Call,
    backend: ChosenBackend,
    part: Part | None = None,
) -> Tensor:
    """Attention with a row per (query, chosen block), a few heads at a time; see ``block_masks.attend_packed``.

    Args:
        query: ``(B, H, S, D)`` in raster order.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        selection: bool ``(B, H, video queries, N)``, made by the call's rule.
        call: what they attend. Its rule bounds the rows; a ``Threshold`` without ``max_density`` does not, and then one
            number is read from the device. At least one head is worked on at a time.
        backend: ``"eager"``, ``"triton"`` or ``"flash"``.
        part: the part of the call that lies here; None for all.

    Raises:
        ValueError: inside ``torch.compile``, if the rule does not bound the rows.
    """
    batch, heads, _, head_dim = query.shape
    partition, rule, text_lengths = call.partition, call.rule, call.text_lengths
    scale = 1 / math.sqrt(head_dim) if call.scale is None else call.scale
    queries = Queries.of(partition) if part is None else part.queries
    selected = with_text(selection, partition, queries)
    group_lengths = None
    if text_lengths is not None:
        group_lengths = valid_group_lengths(partition, text_lengths).repeat_interleave(heads, 0)
        selected = selected & (group_lengths > 0).view(batch, heads, 1, -1)  # no row without a key
    selected = selected.flatten(0, 1)
    row_bytes = max(head_dim, value.shape[-1]) * query.element_size()
    all_heads = part.size if part is not None and part.dim == 1 else heads
    forward, backward = _sections(
        selected, partition, rule, heads, all_heads, queries, call.max_row_bytes // row_bytes, _COPIES[backend]
    )
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    output, _ = attend_rows(
        query, key, value, selected, block_slots(partition, query.device), rooms=(Room(*forward), Room(*backward)),
        scale=scale, backend=backend, group_lengths=group_lengths,
    )  # fmt: skip
    return output.unflatten(0, (batch, heads))


def _sections(
    selected: Tensor,
    partition: BlockPartition,
    rule: Rule,
    heads: int,
    all_heads: int,
    queries: Queries,
    max_rows: int,
    copies: tuple[int, int],
) -> list[tuple[int, int]]:
    """The heads that go together, a divisor of all, and the tiles of rows they may need; forward, then backward."""
    together = max_row_tiles(partition, rule, all_heads, heads, queries)
    if together is not None and rule.pool in ("block", "global"):
        # Such a pool bounds its heads together. Apart, any one of them may hold nearly all pairs.
        return [(heads, together)] * 2
    each = max_row_tiles(partition, rule, all_heads, 1, queries) or _read_row_tiles(selected)
    sections = []
    for of_rows in copies:
        head = of_rows * each * TILE
        # A list inside: on torch 2.11 a generator here breaks the graph.
        fitting = max([n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * head <= max_rows)])
        sections.append((fitting, fitting * each))
    return sections


def max_row_tiles(
    partition: BlockPartition, rule: Rule, heads: int, section: int, queries: Queries | None = None
) -> int | None:
    """The most tiles of rows that the queries of ``section`` of a sample's ``heads`` can need; None without a cap."""
    queries = queries or Queries.of(partition)
    tokens, blocks = partition.num_video_tokens, partition.num_blocks
    # Pairs of a pool, pools, and own pairs, which a pool keeps even beyond its cap.
    length, pools, own = {
        "query": (blocks, section * queries.video, 1),
        "head": (tokens * blocks, section, tokens),
        "block": (heads * tokens, blocks, max(group_sizes(partition)[:blocks]) * heads),
        "global": (heads * tokens * blocks, 1, heads * tokens),
    }[rule.pool]
    cap = rule.max_pairs(length, blocks)
    if cap is None:
        return None
    pairs = min(pools * max(cap, own), section * queries.video * blocks)
    groups = blocks
    if partition.prefix + partition.suffix:
        groups += 1
        pairs += section * (queries.video + (queries.before + queries.behind) * groups)
    return (pairs + section * groups * (TILE - 1)) // TILE


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
