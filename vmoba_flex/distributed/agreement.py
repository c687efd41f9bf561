"""Checks that all ranks mean the same call, before they exchange tokens."""

import json
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.collectives import Ranks, all_reduce
from vmoba_flex.distributed.exchange import Layout
from vmoba_flex.distributed.group import RankGroup
from vmoba_flex.distributed.shards import TokenShards
from vmoba_flex.partition import BlockPartition

_BYTES = 2048


def agreed_layout(
    query: Any, key: Any, value: Any, partition: Any, settings: dict[str, Any], group: RankGroup
) -> Layout:
    """The layout of a call whose inputs are not checked yet; with ``group.check``, once all ranks mean the same call.

    Raises:
        TypeError: if ``partition`` is no ``BlockPartition``.
        ValueError: if shards do not fit the call, or ranks disagree.
    """
    ranks = group.ranks
    if group.check:
        check_ranks_agree(query, key, value, settings, group.shards or TokenShards(), partition, ranks)
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
    return Layout.of(ranks, group.shards, partition)


def check_ranks_agree(
    query: Any, key: Any, value: Any, settings: dict[str, Any], shards: TokenShards, partition: Any, ranks: Ranks
) -> None:
    """Raises on all ranks unless they mean the same call; costs one collective of 2 KiB for each rank and a host read.

    Args:
        query: ``(B, H, tokens of this rank, D)``, not checked yet, as all that follows.
        key: ``(B, key heads, tokens of this rank, D)``.
        value: ``(B, key heads, tokens of this rank, value dim)``.
        settings: what else must be the same on all ranks, by name.
        shards: which tokens each rank holds.
        partition: the blocks.
        ranks: that share the call.

    Raises:
        ValueError: naming a rank, its value and that of rank 0.
    """
    tensors = {"query": query, "key": key, "value": value}
    facts = {name: str(setting) for name, setting in ({"partition": partition, "shards": shards} | settings).items()}
    for name, x in tensors.items():
        facts[f"{name}'s shape without its tokens"] = str([*x.shape[:2], *x.shape[3:]]) if _is_4d(x) else _what(x)
        facts[f"{name}'s dtype"] = str(getattr(x, "dtype", None))
    tokens = {name: x.shape[2] if _is_4d(x) else None for name, x in tensors.items()}
    told = json.dumps([list(facts.values()), list(tokens.values())]).encode()
    if len(told) > _BYTES:
        raise ValueError(
            f"check must be False for a call whose description exceeds {_BYTES} bytes, got {len(told)} bytes"
        )
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    said = torch.zeros(ranks.size, _BYTES, dtype=torch.uint8, device=device)
    said[ranks.rank] = torch.tensor(list(told.ljust(_BYTES)), device=device)
    answers = [json.loads(bytes(answer)) for answer in all_reduce(said, "sum", ranks.group).tolist()]
    for rank, (answer, _) in enumerate(answers):
        for name, first, other in zip(facts, answers[0][0], answer, strict=True):
            if first != other:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {first} on rank 0 and {other} on rank {rank}"
                )
    spans = shards.spans(partition, ranks.size)
    for rank, (_, counts) in enumerate(answers):
        expected = sum(count for _, count in spans[rank])
        for name, count in zip(tokens, counts, strict=True):
            if count != expected:
                raise ValueError(f"{name} must have the {expected} tokens of its shards on rank {rank}, got {count}")


def _is_4d(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def _what(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
