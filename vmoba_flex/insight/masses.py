"""Full attention of some queries of a record: masses, entropy, and what a choice with or without a tail keeps of it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.cells import cell_ids, cell_means
from vmoba_flex.groups import group_of_key, group_sizes
from vmoba_flex.insight.records import Record
from vmoba_flex.partition import BlockPartition
from vmoba_flex.selection.exact_gate import group_lse
from vmoba_flex.selection.select import POOL_DIMS
from vmoba_flex.tail import Cells, Tail

_LOGITS = 2**24  # in memory at a time


@torch.no_grad()
def true_mass(record: Record, partition: BlockPartition, rows: Tensor) -> Tensor:
    """The share of some video queries' full attention on each block, as ``block_masses`` has it of all queries.

    Args:
        record: query and key.
        partition: the blocks.
        rows: int64, among the video tokens.

    Returns:
        float32 at least ``(heads, rows, N)``; the rest up to 1 is on text.
    """
    query, lengths = record.query[None, :, partition.prefix + rows], None
    if record.text_length is not None:
        lengths = torch.tensor([record.text_length], device=query.device)
    groups = len(group_sizes(partition))
    lse = group_lse(query, record.key[None], partition, 0, len(rows), _scale(record), groups, lengths)[0]
    return (lse[:, : partition.num_blocks] - lse.logsumexp(1, keepdim=True)).exp().mT


@torch.no_grad()
def entropy_of(record: Record, partition: BlockPartition, rows: Tensor) -> Tensor:
    """Entropy of the same queries' full attention in nats, float32 ``(heads, rows)``."""
    entropy = torch.empty(len(record.query), len(rows), device=record.key.device)
    for head, part, logits in _logits(record, partition, rows):
        entropy[head, part] = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy


def recall_of(mass: Tensor, chosen: Tensor) -> Tensor:
    """Share of each query's attention on chosen blocks and on text, which is always attended, ``(heads, rows)``."""
    return 1 - (mass * ~chosen).sum(-1)


@torch.no_grad()
def overlap_of(record: Record, partition: BlockPartition, rows: Tensor, chosen: Tensor, tail: Tail) -> Tensor:
    """The weight that sparse attention and full attention give to the same keys; see ``HeadReport``.

    Args:
        record: query and key.
        partition: the blocks.
        rows: int64, among the video tokens.
        chosen: bool ``(heads, rows, N)``.
        tail: how the other blocks take part.

    Returns:
        float32 ``(heads, rows)``.
    """
    groups = group_of_key(partition, record.key.device)
    video = slice(partition.prefix, partition.prefix + partition.num_video_tokens)
    overlap = torch.empty(chosen.shape[:2], device=chosen.device)
    attended = F.pad(chosen, (0, 1), value=True)  # all text
    cells = Cells(partition, tail.cell_of(partition))
    cell_of_key = cell_ids(cells, record.key.device)
    for head, part, logits in _logits(record, partition, rows):
        # Of a skipped key, the logit of its cell: the cell's weight is the sum over its tokens.
        means = cell_means(record.key[None, head : head + 1], cells)[0, 0].float()
        of_cells = record.query[head, partition.prefix + rows[part]].float() @ means.T * _scale(record)
        others = logits.clone()
        others[:, video] = of_cells.index_select(1, cell_of_key)
        sparse = torch.where(attended[head, part].index_select(1, groups), logits, others).softmax(-1)
        overlap[head, part] = torch.minimum(sparse, logits.softmax(-1)).sum(-1)
    return overlap


def _logits(record: Record, partition: BlockPartition, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A head, some of the rows and their scaled scores of all keys, -inf at padding, as many as fit in memory."""
    valid = record.key_valid()
    for head, (query, key) in enumerate(zip(record.query, record.key, strict=True)):
        key = key.float()
        for part in torch.arange(len(rows), device=rows.device).split(max(1, _LOGITS // len(key))):
            logits = query[partition.prefix + rows[part]].float() @ key.T * _scale(record)
            yield head, part, logits if valid is None else logits.masked_fill(~valid, -torch.inf)


def _scale(record: Record) -> float:
    return record.query.shape[-1] ** -0.5


def best_choice(mass: Tensor, own: Tensor, chosen: Tensor, pool: str) -> Tensor:
    """Own blocks and the pairs of largest mass, as many in each pool as ``chosen`` has.

    Args:
        mass: ``(heads, rows, N)``.
        own: bool ``(rows, N)``.
        chosen: bool ``(heads, rows, N)``, own blocks included.
        pool: what competes.
    """
    apart, competing = POOL_DIMS[pool]
    order = [*apart, *competing]
    by_pool = [(mass + 2.0 * own)[None], chosen[None]]
    values, taken = (x.permute(order).flatten(0, len(apart) - 1).flatten(1) for x in by_pool)
    place = values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    best = place < taken.sum(-1, keepdim=True)
    back = [order.index(dim) for dim in range(4)]
    return best.view([chosen[None].shape[dim] for dim in order]).permute(back)[0]
