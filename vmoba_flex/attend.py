"""One call on one device, from inputs that have been checked."""

import functools

from torch import Tensor

from vmoba_flex.dense import dense_attention
from vmoba_flex.mask import keys_there
from vmoba_flex.packed import MAX_ROW_BYTES, packed_attention
from vmoba_flex.part import Part
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection import choose_blocks
from vmoba_flex.shared import shared_attention
from vmoba_flex.stats import Attended
from vmoba_flex.tiles import tiles_attention


def attend_here(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: BlockPartition,
    rule: Rule,
    scale: float | None,
    enable_gqa: bool,
    dispatch: str,
    kernels: str,
    max_row_bytes: int = MAX_ROW_BYTES,
    text_lengths: Tensor | None = None,
    part: Part | None = None,
) -> Attended:
    """Attention by one dispatch.

    Args:
        query: ``(B, H, queries, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        partition: the blocks.
        rule: chooses them.
        scale: ``1 / sqrt(D)`` if None.
        enable_gqa: whether key may have fewer heads.
        dispatch: any but ``"auto"``.
        kernels: what ``choose_backend`` says.
        max_row_bytes: as in ``vmoba_attention``.
        text_lengths: as in ``vmoba_attention``.
        part: the heads, or the queries, of the call that lie here; None for all.
    """
    attended = functools.partial(
        Attended, query=query, key=key, partition=partition, rule=rule, text_lengths=text_lengths, part=part
    )
    if dispatch == "dense":
        return attended(dense_attention(query, key, value, scale, enable_gqa, keys_there(partition, text_lengths)))
    if dispatch == "shared":
        output, selected, slots = shared_attention(
            query, key, value, partition, rule, scale, enable_gqa, kernels, text_lengths=text_lengths, part=part
        )
        return attended(output, tiles=(selected, slots))
    selection = choose_blocks(query, key, partition, rule, part)
    if dispatch == "packed":
        output = packed_attention(
            query, key, value, selection, partition, rule, scale, kernels, max_row_bytes, text_lengths, part
        )
    else:
        queries = part.queries if part is not None and part.dim == 2 else None
        output = tiles_attention(query, key, value, selection, partition, scale, enable_gqa, text_lengths, queries)
    return attended(output, selection=selection)
