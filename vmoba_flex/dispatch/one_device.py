"""Checked inputs and a chosen dispatch -> what one device attends."""

import functools

import torch
from torch import Tensor

from block_masks.launching.transforms import in_transform
from vmoba_flex.call import Call, ChosenBackend, Dispatch
from vmoba_flex.dispatch.dense import dense_attention
from vmoba_flex.dispatch.packed import packed_attention
from vmoba_flex.dispatch.shared import shared_attention
from vmoba_flex.dispatch.tiles import attend_all, tiles_attention
from vmoba_flex.groups import valid_keys
from vmoba_flex.part import Part
from vmoba_flex.selection.kept import Selection
from vmoba_flex.selection.select import choose_blocks
from vmoba_flex.stats import Attended


def attend_here(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    dispatch: Dispatch,
    backend: ChosenBackend,
    part: Part | None = None,
) -> Attended:
    """Attention by one dispatch.

    Args:
        query: ``(B, H, queries, D)``.
        key: ``(B, key heads, S, D)``.
        value: ``(B, key heads, S, value dim)``.
        call: what they attend.
        dispatch: any but ``"auto"``.
        backend: what ``choose_backend`` returns.
        part: the part of the call on this rank; None for all.
    """
    if call.text_lengths is not None:
        key, value = _without_padding(key, value, call)
    attended = functools.partial(Attended, query=query, key=key, call=call, part=part)
    if dispatch == "dense":
        valid = valid_keys(call.partition, call.text_lengths)
        # Transforms see through our own path, but not through the fused kernels of scaled_dot_product_attention.
        if call.lse or in_transform(query, key, value):
            output, lse = attend_all(query, key, value, call, valid)
            return attended(output, lse=lse if call.lse else None)
        return attended(dense_attention(query, key, value, call.scale, call.enable_gqa, valid))
    if dispatch == "shared":
        shared = shared_attention(query, key, value, call, backend, part=part)
        return attended(shared.output, lse=shared.lse, tile_choice=(shared.selected, shared.slots))
    if isinstance(call.rule, Selection):
        selection = call.rule.selected(part)
    else:
        selection = choose_blocks(query, key, call.partition, call.rule, part)
    if dispatch == "packed":
        output, lse = packed_attention(query, key, value, selection, call, backend, part)
    else:
        queries = part.queries if part is not None and part.dim == 2 else None
        output, lse = tiles_attention(query, key, value, selection, call, queries)
    return attended(output, lse=lse, selection=selection)


def _without_padding(key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Key and value with zeros at padding: a weight of zero times NaN is NaN."""
    valid = valid_keys(call.partition, call.text_lengths)
    assert valid is not None
    return tuple(torch.where(valid[:, None, :, None], x, 0) for x in (key, value))
