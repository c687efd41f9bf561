"""The layers of the demo that have a tail, how they attend, and what their tail keeps."""

import dataclasses

import torch
from torch import Tensor

from vmoba_flex import BlockPartition, Tail, VMoBAAttention, VMoBAConfig
from vmoba_flex.insight.masses import overlap_of
from vmoba_flex.insight.records import Record

TAILED = ("2D", "3D")
"""Kinds of layers with a tail; 1D layers have none.

The model was trained without a tail, and frames resemble each other: under full attention its 1D layers give nearly
what they give when a query skips frames (0.05 and 0.11 off), and less so with cells of these (0.07 and 0.29 off).
"""

_TAIL = Tail(16)
_ROWS = 512


def tail_of(kind: str) -> Tail | None:
    """The tail of a layer: of kind "full", "1D", "2D" or "3D"."""
    return _TAIL if kind in TAILED else None


def attention_with_tail(config: VMoBAConfig, layer: int, num_layers: int, kind: str) -> VMoBAAttention:
    """A layer's attention with the tail of its kind, in plain PyTorch, which needs no compilation."""
    config = dataclasses.replace(config, dispatch="packed", backend="auto", tail=tail_of(kind))
    return VMoBAAttention(config, layer, num_layers)


def overlap(query: Tensor, key: Tensor, selection: Tensor, partition: BlockPartition, tail: Tail) -> float:
    """The share of attention on the same keys as full attention's, mean over heads and 512 queries.

    Args:
        query: (1, heads, tokens, head_dim), raster order.
        key: like query.
        selection: bool (1, heads, tokens, blocks).
        partition: the blocks.
        tail: how the others take part.
    """
    rows = torch.linspace(0, query.shape[2] - 1, min(_ROWS, query.shape[2])).long()
    record = Record(query[0], key[0], partition)
    return overlap_of(record, partition, rows, selection[0][:, rows], tail).mean().item()
