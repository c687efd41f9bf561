"""What a rule keeps of a model's attention: density, recall and entropy of each head."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vmoba_flex.checks import check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.groups import group_of_key
from vmoba_flex.insight.records import Record
from vmoba_flex.mask import selection_tiles
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.select import POOL_DIMS, choose_blocks

_LOGITS = 2**24  # in memory at a time


@dataclasses.dataclass(frozen=True)
class HeadReport:
    """What one head of one layer keeps at one step.

    Attributes:
        model: the pipeline's name for the model.
        layer: from 0.
        step: from 0.
        kind: of the blocks.
        head: its index in the layer.
        density: share of the (query, block) pairs that are chosen.
        tile_density: share of the 128 x 128 tiles, in block order, that hold a chosen pair.
        recall: share of a query's full attention that falls on what it attends, chosen blocks and all text; mean over
            the sampled queries.
        best_recall: recall of the best choice with as many pairs in each pool of the sampled queries: own blocks, and
            the pairs with the largest true mass.
        entropy: of a query's full attention, in nats, mean over the sampled queries; the logarithm of the number of
            tokens if attention is uniform.
    """

    model: str
    layer: int
    step: int
    kind: str
    head: int
    density: float
    tile_density: float
    recall: float
    best_recall: float
    entropy: float


def inspect(records: Sequence[Record], rule: Rule | VMoBAConfig, *, rows: int = 256, seed: int = 0) -> list[HeadReport]:
    """What each head of each record keeps under a rule or a config.

    Blocks are chosen for all queries, as at run time; pools over heads see only the recorded heads. Full attention is
    computed for ``rows`` video queries only, drawn by ``seed`` without replacement.

    Args:
        records: of any layers and steps.
        rule: a rule, on the blocks of the records; or a config, which brings its own blocks, and a rule by layer.
        rows: sampled queries of each record.
        seed: of the sample.

    Raises:
        ValueError: if ``rows`` is below 1, a config's block exceeds the grid, or its dense layers cannot be known from
            a record.
    """
    check_positive("rows", rows)
    return [report for record in records for report in _inspect(record, rule, rows, seed)]


def _inspect(record: Record, rule: Rule | VMoBAConfig, rows: int, seed: int) -> list[HeadReport]:
    kind, partition, plain = layer_of(record, rule)
    sample = sample_rows(partition, rows, seed).to(record.query.device)
    mass, entropy = true_mass(record, partition, sample)
    chosen = choose(record, partition, plain)
    own = own_blocks(partition, record.query.device)
    best = best_choice(mass, own[sample], chosen[:, sample], "query" if plain is None else plain.pool)
    tiles = selection_tiles(chosen[None], partition, "block", key_valid=_batched(record.key_valid())).some[0]
    values = (
        chosen.float().mean((1, 2)),
        tiles.float().mean((1, 2)),
        recall_of(mass, chosen[:, sample]).mean(1),
        recall_of(mass, best).mean(1),
        entropy.mean(1),
    )
    return [
        HeadReport(record.model, record.layer, record.step, kind, head, *(float(value[i]) for value in values))
        for i, head in enumerate(record.heads)
    ]


def layer_of(record: Record, rule: Rule | VMoBAConfig) -> tuple[str, BlockPartition, Rule | None]:
    """A record's kind, blocks and rule; the rule of a dense layer is None.

    Raises:
        ValueError: if a config's dense layers or its rule cannot be known from the record, or its block exceeds the
            grid.
    """
    if not isinstance(rule, VMoBAConfig):
        return record.kind, record.partition, rule
    of_sparse_steps = dataclasses.replace(rule, dense_steps=0)
    layer = of_sparse_steps.layer(record.layer, num_layers_of(record, rule), record.step, record.num_steps)
    where = record.partition
    partition = rule.partition(layer.kind, where.grid, where.prefix, where.suffix)
    return layer.kind, partition, None if layer.dense else layer.rule


def num_layers_of(record: Record, config: VMoBAConfig) -> int:
    """Layers of the record's model, or, if unknown, as many as record and config speak of."""
    if record.num_layers is not None:
        return record.num_layers
    if isinstance(config.rule, tuple):
        return len(config.rule)
    dense = config.dense_layers
    if isinstance(dense, int):
        return max(record.layer + 1, dense)
    if any(layer < 0 for layer in dense):
        raise ValueError(
            f"num_layers of a record must be given where dense_layers counts from the end, {dense}, got None"
        )
    return 1 + max(record.layer, *dense) if dense else record.layer + 1


def sample_rows(partition: BlockPartition, rows: int, seed: int) -> Tensor:
    """Indices of ``rows`` video queries drawn without replacement, in order; of all queries if they are fewer."""
    order = torch.randperm(partition.num_video_tokens, generator=torch.Generator().manual_seed(seed))
    return order[:rows].sort().values


def own_blocks(partition: BlockPartition, device: torch.device) -> Tensor:
    """Each video query's own block, bool ``(video tokens, N)``."""
    return partition.block_ids(device)[:, None] == torch.arange(partition.num_blocks, device=device)


@torch.no_grad()
def choose(record: Record, partition: BlockPartition, rule: Rule | None) -> Tensor:
    """What a rule chooses, or everything without a rule: bool ``(heads, video tokens, N)``."""
    if rule is None:
        shape = len(record.query), partition.num_video_tokens, partition.num_blocks
        return torch.ones(shape, dtype=torch.bool, device=record.query.device)
    return choose_blocks(record.query[None], record.key[None], partition, rule)[0]


@torch.no_grad()
def true_mass(record: Record, partition: BlockPartition, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention of some video queries, in float32.

    Args:
        record: query and key.
        partition: the blocks.
        rows: int64, among the video tokens.

    Returns:
        Mass on each block ``(heads, rows, N)``, where the rest up to 1 is on text; entropy in nats ``(heads, rows)``.
    """
    groups = group_of_key(partition, record.key.device).long()
    valid, scale = record.key_valid(), record.query.shape[-1] ** -0.5
    mass = torch.zeros(len(record.query), len(rows), partition.num_blocks + 1, device=record.key.device)
    entropy = torch.zeros(mass.shape[:2], device=record.key.device)
    for head, (query, key) in enumerate(zip(record.query, record.key, strict=True)):
        key = key.float()
        for part in torch.arange(len(rows), device=rows.device).split(max(1, _LOGITS // len(key))):
            logits = query[partition.prefix + rows[part]].float() @ key.T * scale
            if valid is not None:
                logits = logits.masked_fill(~valid, -torch.inf)
            shares = logits.log_softmax(-1)
            entropy[head, part] = torch.special.entr(shares.exp()).sum(-1)
            mass[head, part] = mass[head, part].index_add(1, groups, shares.exp())
    return mass[..., :-1], entropy


def recall_of(mass: Tensor, chosen: Tensor) -> Tensor:
    """Share of each query's attention on chosen blocks and on text, which is always attended, ``(heads, rows)``."""
    return 1 - (mass * ~chosen).sum(-1)


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


def _batched(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[None]
