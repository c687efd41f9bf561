"""What a rule keeps of a model's attention: density, recall, overlap and entropy of each head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmoba_flex.checks import check_int, check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.inputs import check_rule
from vmoba_flex.insight.masses import best_choice, entropy_of, overlap_of, recall_of, true_mass
from vmoba_flex.insight.records import Record, check_records
from vmoba_flex.mask import selection_tiles
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule
from vmoba_flex.selection.select import choose_blocks
from vmoba_flex.tail import Tail


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
        overlap: what recall and a tail keep together: the attention weight that the call and full attention give to the
            same keys, where a cell's weight counts as spread evenly over its tokens; mean over the sampled queries.
            Without a tail it is the recall. An output is off full attention's by at most ``2 * (1 - overlap)`` times
            the largest value.
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
    overlap: float
    entropy: float


def inspect(
    records: Sequence[Record],
    rule: Rule | VMoBAConfig,
    *,
    tail: Tail | None = None,
    rows: int = 256,
    seed: int = 0,
) -> list[HeadReport]:
    """What each head of each record keeps under a rule or a config.

    Blocks are chosen for all queries, as at run time; pools over heads see only the recorded heads. Full attention is
    computed for ``rows`` video queries only, drawn by ``seed`` without replacement.

    Args:
        records: of any layers and steps.
        rule: a rule, on the blocks of the records; or a config, which brings its own blocks and tail, and a rule by
            layer.
        tail: how skipped blocks take part next to a rule; None if they do not.
        rows: sampled queries of each record.
        seed: of the sample.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if ``rows`` is below 1, ``seed`` is out of range, there is a tail next to a config, a block exceeds
            the grid or a cell its block, or a config's dense layers cannot be known from a record.
    """
    check_records(records)
    check_sample(rows, seed)
    if not isinstance(rule, VMoBAConfig):
        check_rule(rule)
    if tail is not None and not isinstance(tail, Tail):
        raise TypeError(f"tail must be a Tail or None, got {tail!r}")
    if isinstance(rule, VMoBAConfig) and tail is not None:
        raise ValueError(f"tail must be None next to a config, which has its own, got {tail}")
    return [report for record in records for report in _inspect(record, rule, tail, rows, seed)]


def _inspect(record: Record, rule: Rule | VMoBAConfig, tail: Tail | None, rows: int, seed: int) -> list[HeadReport]:
    kind, partition, plain, of_config = layer_of(record, rule)
    tail = of_config or tail
    sample = sample_rows(partition, rows, seed).to(record.query.device)
    mass = true_mass(record, partition, sample)
    chosen = choose(record, partition, plain)
    own = own_blocks(partition, record.query.device)
    best = best_choice(mass, own[sample], chosen[:, sample], "query" if plain is None else plain.pool)
    tiles = selection_tiles(chosen[None], partition, "block", key_valid=_batched(record.key_valid())).some[0]
    recall = overlap = recall_of(mass, chosen[:, sample])
    if tail is not None:
        overlap = overlap_of(record, partition, sample, chosen[:, sample], tail)
    values = (
        chosen.float().mean((1, 2)),
        tiles.float().mean((1, 2)),
        recall.mean(1),
        recall_of(mass, best).mean(1),
        overlap.mean(1),
        entropy_of(record, partition, sample).mean(1),
    )
    return [
        HeadReport(record.model, record.layer, record.step, kind, head, *(float(value[i]) for value in values))
        for i, head in enumerate(record.heads)
    ]


def layer_of(record: Record, rule: Rule | VMoBAConfig) -> tuple[str, BlockPartition, Rule | None, Tail | None]:
    """A record's kind, blocks, rule and the config's tail; the rule of a dense layer is None.

    Raises:
        ValueError: if a config's dense layers or its rule cannot be known from the record, or its block exceeds the
            grid.
    """
    if not isinstance(rule, VMoBAConfig):
        return record.kind, record.partition, rule, None
    of_sparse_steps = dataclasses.replace(rule, dense_steps=0, remember=None)
    layer = of_sparse_steps.layer(record.layer, num_layers_of(record, rule), record.step, record.num_steps)
    where = record.partition
    partition = rule.partition(layer.kind, where.grid, where.prefix, where.suffix)
    return layer.kind, partition, None if layer.dense else layer.rule, layer.tail


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


def check_sample(rows: Any, seed: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless these are a number of rows and a seed of torch's."""
    check_positive("rows", rows)
    check_int("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must lie in -2**63..2**63 - 1, got {seed}")


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


def _batched(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[None]
