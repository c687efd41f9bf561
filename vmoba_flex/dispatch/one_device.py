"""Checked inputs and a chosen dispatch -> what one device attends."""

import functools
from typing import Any

import torch
from torch import Tensor

from block_masks.attention.plain import plain_attention
from block_masks.launching.transforms import in_transform
from vmoba_flex.call import Call, ChosenBackend, Dispatch
from vmoba_flex.dispatch.dense import dense_attention
from vmoba_flex.dispatch.packed import packed_attention
from vmoba_flex.dispatch.shared import shared_attention
from vmoba_flex.dispatch.tiles import attend_all, tiles_attention
from vmoba_flex.groups import valid_keys
from vmoba_flex.inputs import scale_of
from vmoba_flex.part import Part, Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.pieces import pieces_of
from vmoba_flex.rules import among
from vmoba_flex.selection.bits import unpack_bits
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
    if call.partition.causal_frames is None:
        return _attend(query, key, value, call, dispatch, backend, part)
    return _attend_pieces(query, key, value, call, dispatch, backend)


def check_pieces(call: Call, dispatch: Dispatch, on_gpu: bool) -> None:
    """Raises ``ValueError`` for what calls of some frames, and of causal partitions, do not take."""
    if call.queries is None and call.partition.causal_frames is None:
        return
    where = "with query_frames" if call.partition.causal_frames is None else "with a partition's causal_frames"
    if on_gpu and dispatch == "shared":
        raise ValueError(f"dispatch must not be 'shared' {where} on a GPU: take 'packed'")
    if isinstance(call.rule, Selection) and call.rule.choice == "tile":
        raise ValueError(f"selection must have choice='token' {where}, got 'tile': tiles of all queries choose there")


def check_whole(partition: Any, query_frames: Any) -> None:
    """Raises ``ValueError`` where ranks would share a call of some frames, or of a causal partition."""
    if query_frames is not None:
        raise ValueError(f"query_frames must be None with a group, got {query_frames!r}")
    if isinstance(partition, BlockPartition) and partition.causal_frames is not None:
        raise ValueError(f"partition must have no causal_frames with a group, got {partition.causal_frames}")


def _attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, call: Call, dispatch: Dispatch, backend: ChosenBackend
) -> Attended:
    """A causal call: one call for each chunk, in which no later chunk takes part."""
    partition, rule = call.partition, call.rule
    queries = call.queries or Queries.of(partition)
    attended = []
    for piece in pieces_of(partition, queries):
        past, here = piece.partition, piece.queries
        of_past = rule if isinstance(rule, Selection) else among(rule, past.num_blocks)
        of_piece = call._replace(partition=past, queries=here, rule=of_past)
        own = query.narrow(2, queries.before + here.first - queries.first, here.video)
        attended.append(_attend(own, piece.keys(key), piece.keys(value), of_piece, dispatch, backend))
    before, _, _, after = queries
    outputs, sums = [x.output for x in attended], [x.lse for x in attended if x.lse is not None]
    if before or after:
        text, text_lse = _attend_text(query, key, value, call)
        outputs = [text[:, :, :before], *outputs, text[:, :, before:]]
        sums = [text_lse[:, :, :before], *sums, text_lse[:, :, before:]]
    lse = torch.cat(sums, 2) if call.lse else None
    return Attended(torch.cat(outputs, 2), query, key, call, lse, pieces=tuple(attended))


def _attend_text(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Prefix and suffix of a causal call, which attend prefix and suffix only: the output and its log-sum-exp."""
    partition = call.partition
    end = partition.prefix + partition.num_video_tokens
    query, key, value = (torch.cat([x[:, :, : partition.prefix], x[:, :, end:]], 2) for x in (query, key, value))
    attended = query.new_ones((*query.shape[:3], key.shape[2]), dtype=torch.bool)
    if call.text_lengths is not None:
        place = torch.arange(key.shape[2], device=key.device)
        attended = attended & (place < call.text_lengths[:, None])[:, None, None]
    q, k, v, allowed = (x.flatten(0, 1) for x in (query, key, value, attended))
    output, lse = plain_attention(q, k, v, allowed, scale_of(call.scale, query))
    return output.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    dispatch: Dispatch,
    backend: ChosenBackend,
    part: Part | None = None,
) -> Attended:
    """``attend_here`` where all keys may be attended."""
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
    queries = call.queries
    if not isinstance(call.rule, Selection):
        selection = choose_blocks(query, key, call.partition, call.rule, part, queries)
    elif queries is None:
        selection = call.rule.selected(part)
    else:
        selection = unpack_bits(call.rule.bits.narrow(3, queries.first, queries.video), call.partition.num_blocks)
    if dispatch == "packed":
        output, lse = packed_attention(query, key, value, selection, call, backend, part)
    else:
        queries = part.queries if part is not None and part.dim == 2 else queries
        output, lse = tiles_attention(query, key, value, selection, call, queries)
    return attended(output, lse=lse, selection=selection)


def _without_padding(key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Key and value with zeros at padding: a weight of zero times NaN is NaN."""
    valid = valid_keys(call.partition, call.text_lengths)
    assert valid is not None
    return tuple(torch.where(valid[:, None, :, None], x, 0) for x in (key, value))
