"""Checks of tensors and their calls, made once at the public door, before any kernel runs."""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from block_masks.attention.coarse_steps import check_coarse_size
from block_masks.checks import check_device, check_shape, check_tensor
from block_masks.launching.transforms import can_read
from vmoba_flex.checks import check_number
from vmoba_flex.part import Queries
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold, TopK, check_rule_fits
from vmoba_flex.tail import Cells, Tail


def check_query_key(
    query: Tensor, key: Tensor, partition: BlockPartition, rule: Rule | None, tokens: int | None = None, ranks: int = 1,
    queries: Queries | None = None,
) -> BlockPartition:  # fmt: skip
    """The partition, with constant sizes; raises unless a selection can be made from these.

    Args:
        query: ``(B, H, S, D)``.
        key: ``(B, key heads, S, D)``.
        partition: the blocks.
        rule: chooses blocks; None where they have been chosen.
        tokens: how many this rank holds, where ranks share the call; None for all tokens of the partition.
        ranks: how many share the call.
        queries: which ``query`` holds, where it holds those of some frames; None for all.

    Returns:
        The partition, with sizes that are constants in graphs.

    Raises:
        TypeError: if an argument has a wrong type or dtype.
        ValueError: if shapes, devices or the rule do not fit, or the selection has 2**31 entries or more.
    """
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
    if rule is not None:
        check_rule(rule)
    partition = partition.constant()
    _check_tensor("query", query)
    _check_tensor("key", key)
    if query.shape[0] < 1 or query.shape[1] < 1 or query.shape[3] < 1:
        raise ValueError(f"query must have no empty dim, got shape {tuple(query.shape)}")
    expected = partition.num_tokens if queries is None else queries.tokens
    if tokens is None and query.shape[1] == expected != query.shape[2]:
        raise ValueError(
            f"query must have shape (B, H, S, D) with {expected} tokens S, got {tuple(query.shape)}, which "
            "looks like (B, S, H, D): pass query.transpose(1, 2), and the same for key and value"
        )
    if queries is not None:
        if query.shape[2] != queries.tokens:
            raise ValueError(
                f"query must have the {queries.tokens} tokens of query_frames, without prefix and suffix, got "
                f"{query.shape[2]} (shape {tuple(query.shape)})"
            )
    elif tokens is None:
        partition.check_tokens("query", query, -2)
    elif query.shape[2] != tokens:
        raise ValueError(
            f"query must have {tokens} tokens on this rank by its shards, got {query.shape[2]} "
            f"(shape {tuple(query.shape)})"
        )
    keys = query.shape[2] if queries is None else partition.num_tokens
    _check_like_query("key", key, query, (query.shape[0], key.shape[1], keys, query.shape[3]))
    if query.shape[1] % max(key.shape[1], 1) or not key.shape[1]:
        raise ValueError(f"key heads must divide query heads {query.shape[1]}, got {key.shape[1]}")
    if rule is not None:
        check_rule_fits(rule, partition)
    if query.is_cuda and partition.axes[0].period:
        raise ValueError(
            f"block must divide causal_frames = {partition.causal_frames} along frames on a GPU, whose kernels cut no "
            f"block at the end of a chunk, got {partition.block}"
        )
    heads = query.shape[1] // key.shape[1] * -(-key.shape[1] // ranks)  # of one rank, with their key heads
    choosing = partition.num_video_tokens if queries is None else queries.video
    entries = query.shape[0] * heads * choosing * partition.num_blocks
    if entries >= 2**31:
        raise ValueError(
            "query and partition must give a selection of fewer than 2**31 entries (B * H * video tokens * num_blocks),"
            f" got {query.shape[0]} * {heads} * {choosing} * {partition.num_blocks} = {entries}"
        )
    return partition


def check_rule(rule: Any) -> None:
    """Raises ``TypeError`` unless ``rule`` is one."""
    if not isinstance(rule, TopK | Threshold):
        raise TypeError(f"rule must be a TopK or a Threshold, got {type(rule).__name__}")


def check_is_device(name: str, device: Any) -> None:
    """Raises ``TypeError`` unless ``device`` is one, or the name of one."""
    if not isinstance(device, torch.device | str):
        raise TypeError(f"{name} must be a torch.device or a str, got {device!r}")


def check_value(value: Tensor, query: Tensor, key: Tensor) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` goes with ``query`` and ``key``."""
    _check_tensor("value", value)
    # The head dim of value is free, as in scaled_dot_product_attention.
    _check_like_query("value", value, query, (query.shape[0], key.shape[1], key.shape[2], value.shape[3]))


def check_scale(scale: Any) -> float | None:
    """The scale as a plain number; raises ``TypeError`` or ``ValueError`` unless it is None or finite."""
    if scale is None:
        return None
    number = check_number("scale", scale, "a number or None")
    if abs(number) > sys.float_info.max or math.isnan(number):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(number)


def scale_of(scale: float | None, query: Tensor) -> float:
    """The factor on the scores of a call: as given, or ``1 / sqrt(D)``."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def check_text_lengths(text_lengths: Any, query: Tensor, partition: BlockPartition) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``text_lengths`` is None or fits; values are read on a CPU only."""
    if text_lengths is None:
        return
    check_tensor("text_lengths", text_lengths, "int64", ("B",))
    check_shape("text_lengths", text_lengths, (query.shape[0],), "query")
    check_device("text_lengths", text_lengths, query)
    text = partition.prefix + partition.suffix
    if not text:
        raise ValueError("text_lengths must be None for a partition without prefix and suffix, got a tensor")
    if can_read(text_lengths) and not 0 <= int(text_lengths.min()) <= int(text_lengths.max()) <= text:
        raise ValueError(f"text_lengths must lie in 0..prefix + suffix = 0..{text}, got {text_lengths.tolist()}")


def check_tail(tail: Any, partition: BlockPartition) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``tail`` is a ``Tail`` whose cells fit the partition's blocks."""
    if not isinstance(tail, Tail):
        raise TypeError(f"tail must be a Tail or None, got {tail!r}")
    tail.cell_of(partition)


def check_tail_size(tail: Tail, partition: BlockPartition, query: Tensor) -> None:
    """Raises ``ValueError`` if a tail has more cells than kernels index on query's device."""
    if query.is_cuda:
        # By all tokens and heads, so that ranks that share a call agree.
        cells = Cells(partition, tail.cell_of(partition)).total
        check_coarse_size("tail", query.shape[0] * query.shape[1], partition.num_tokens, cells)


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, cast as autocast casts them for attention, so that every dispatch sees the same ones."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if any(isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested) for x in tensors):
        return tensors  # refused by what checks them
    if device == "meta" or not torch.is_autocast_enabled(device):  # which autocast does not know
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def _check_tensor(name: str, x: Any) -> None:
    if hasattr(x, "to_local"):
        raise TypeError(f"{name} must be a plain tensor, got a {type(x).__name__}: pass its to_local()")
    check_tensor(name, x, "float", ("B", "H", "S", "D"))


def _check_like_query(name: str, x: Tensor, query: Tensor, expected: tuple[int, ...]) -> None:
    if x.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
    check_device(name, x, query)
    check_shape(name, x, expected, "query")
