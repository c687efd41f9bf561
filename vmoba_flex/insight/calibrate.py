"""Finds the rules that reach a wanted recall, or a wanted density, on recorded query and key."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch

from vmoba_flex.by_steps import BySteps
from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_fields import LayerRule, rule_of_layer
from vmoba_flex.dispatch.choose import dense_seconds, packed_share, packed_wins
from vmoba_flex.insight.measure import choose, layer_of, num_layers_of, recall_of, sample_rows, true_mass
from vmoba_flex.insight.records import Record
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.tail import Tail

MARGIN = 1.25
"""``max_density`` over the density that was measured: videos may be denser by so much before it cuts."""

_TOLERANCE = 0.002
_HALVINGS = 14
_Measure = Callable[[Rule], dict[str, float]]

By = Literal["kind", "layer"]
_BY: tuple[By, ...] = get_args(By)


class Calibrated(NamedTuple):
    """What was found for the layers of one kind, or one layer; of rules that change by steps, for one of them.

    Attributes:
        kind: of the blocks.
        rule: the rule.
        recall: mean over records, heads and sampled queries.
        density: mean over records, heads and queries.
        records: the number of records.
        auto: what ``dispatch="auto"`` takes on a GPU at the records' sizes, forward: ``"packed"`` or ``"dense"``.
        share: estimated time of ``packed`` as a share of full attention's, by which ``auto`` decides: at the largest
            density that the rule allows. ``auto`` also takes ``"dense"`` where full attention takes less time than
            launching ``packed``.
        layer: the layer, where each has a rule of its own; None for all of the kind.
        start: from which step or share of the steps on the rule holds; None for all steps.
    """

    kind: str
    rule: Rule
    recall: float
    density: float
    records: int
    auto: str
    share: float
    layer: int | None = None
    start: int | float | None = None


def calibrate(
    records: Sequence[Record],
    config: VMoBAConfig,
    *,
    recall: float | None = None,
    density: float | None = None,
    by: By = "kind",
    rows: int = 256,
    seed: int = 0,
) -> tuple[VMoBAConfig, list[Calibrated]]:
    """A config whose rules reach a mean recall, or a mean density, over the layers of each kind, or in each layer.

    For each kind of the config's cycle, or each layer, bisection finds the smallest ``tau`` of its ``Threshold``, or
    the smallest ``density`` of its ``TopK``, that reaches what is wanted. Of a rule that changes by steps, it finds
    each entry's, on the records of the steps at which the entry holds: a recall then decides how densities fall. A
    ``Threshold`` ends within 0.002 above it; a ``TopK`` moves in whole blocks, and may exceed it by what one block
    holds.

    A ``Threshold`` without ``max_density`` gets one, since ``dispatch="auto"`` cannot bound its cost otherwise and
    takes full attention: 1.25 times the measured density, or 1.25 times that until recall is within reach. It also
    holds on the recordings: a pool that would keep more is cut.

    Layers that the config has dense are left out. Recall is measured as ``inspect`` does: record several prompts and
    steps, because what holds for one video may not for the next.

    Args:
        records: of dense or sparse forwards, at least one of each kind.
        config: brings blocks, cycle, dense layers and steps, and each kind's rule with its pool, ``normalize`` and
            ``max_density``, all of which are kept.
        recall: wanted share of attention, in (0, 1].
        density: wanted share of the pairs, in place of ``recall``.
        by: ``"kind"`` for one rule for each kind, ``"layer"`` for one for each layer, which needs records of all layers
            that are not dense.
        rows: sampled queries of each record.
        seed: of the sample.

    Returns:
        The config, and what was found for each kind or layer, entry by entry.

    Raises:
        ValueError: if both or neither of ``recall`` and ``density`` are given, one is not in (0, 1], ``by`` is unknown,
            a kind, layer or entry has no records, or what is wanted cannot be reached.
    """
    if (recall is None) == (density is None):
        raise ValueError(f"exactly one of recall and density must be given, got {recall!r} and {density!r}")
    name, wanted = ("recall", recall) if recall is not None else ("density", density)
    assert wanted is not None
    if not 0 < wanted <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {wanted!r}")
    check_positive("rows", rows)
    check_choice("by", by, _BY)
    sparse = [record for record in records if layer_of(record, config)[2] is not None]
    found: list[Calibrated] = []
    by_kind: dict[str, LayerRule] = {}
    by_layer = _rules_of_layers(records, config) if by == "layer" else []
    for kind, layer, here in _by_layer(sparse, config, len(by_layer)) if by == "layer" else _by_kind(sparse, config):
        setting = rule_of_layer(config.rule, kind, here[0].layer, num_layers_of(here[0], config))
        pairs = []
        for start, rule, there in _by_entry(setting, here, kind if layer is None else f"layer {layer}"):
            one = _find(kind, rule, there, config, name, wanted, _measure_of(there, config, rows, seed))
            found.append(one._replace(layer=layer, start=start))
            pairs.append((start, one.rule))
        rule = BySteps(pairs) if isinstance(setting, BySteps) else found[-1].rule
        if layer is None:
            by_kind[kind] = rule
        else:
            by_layer[layer] = rule
    return dataclasses.replace(config, rule=by_layer or by_kind), found


def _rules_of_layers(records: Sequence[Record], config: VMoBAConfig) -> list[LayerRule]:
    """Each layer's rule as the config has it."""
    counts = {num_layers_of(record, config) for record in records}
    if len(counts) != 1:
        raise ValueError(f"records must be of models with one number of layers for by='layer', got {sorted(counts)}")
    (count,) = counts
    kinds = [config.cycle[layer % len(config.cycle)] for layer in range(count)]
    return [rule_of_layer(config.rule, kind, layer, count) for layer, kind in enumerate(kinds)]


def _by_kind(records: list[Record], config: VMoBAConfig) -> Iterator[tuple[str, None, list[Record]]]:
    for kind in dict.fromkeys(config.cycle):
        here = [record for record in records if layer_of(record, config)[0] == kind]
        if not here:
            raise ValueError(f"records must have a {kind} layer that is not dense in the config, got none")
        yield kind, None, here


def _by_layer(records: list[Record], config: VMoBAConfig, count: int) -> Iterator[tuple[str, int, list[Record]]]:
    for layer in range(count):
        if dataclasses.replace(config, dense_steps=0).layer(layer, count, 0, 1).dense:
            continue
        here = [record for record in records if record.layer == layer]
        if not here:
            raise ValueError(f"records must have layer {layer}, which is not dense in the config, got none")
        yield config.cycle[layer % len(config.cycle)], layer, here


def _by_entry(
    setting: LayerRule, records: list[Record], where: str
) -> Iterator[tuple[int | float | None, Rule, list[Record]]]:
    """Each rule of a layer, and the records of its steps."""
    if not isinstance(setting, BySteps):
        yield None, setting, records
        return
    for i, (start, rule) in enumerate(setting.pairs):
        there = [record for record in records if setting.index(record.step, record.num_steps) == i]
        if not there:
            raise ValueError(f"records must have a step at which {where} has the rule from {start} on, got none")
        yield start, rule, there


def _find(
    kind: str, start: Rule, records: list[Record], config: VMoBAConfig, name: str, wanted: float, measure: _Measure
) -> Calibrated:
    found = _smallest(start, name, wanted, measure)
    if found is None:
        most = measure(_rule_at(start, 1.0))[name]
        raise ValueError(f"{name} {wanted} must be within reach of {start!r}, got at most {most:.3f} for {kind}")
    if isinstance(start, Threshold) and start.max_density is None:
        found = _smallest_capped(start, name, wanted, measure, found[1]["density"])
    rule, values = found
    share = max(packed_share(rule, layer_of(record, config)[1], config.tail) for record in records)
    wins = all(_auto_is_packed(record, layer_of(record, config)[1], rule, config.tail) for record in records)
    return Calibrated(
        kind, rule, values["recall"], values["density"], len(records), "packed" if wins else "dense", share
    )


def _smallest(start: Rule, name: str, wanted: float, measure: _Measure) -> tuple[Rule, dict[str, float]] | None:
    """The smallest ``tau`` or ``density`` that reaches what is wanted, and its values; None if none does."""
    low, high = 0.0, 1.0
    best = measure(_rule_at(start, high))
    if best[name] < wanted - 1e-6:
        return None
    for _ in range(_HALVINGS):
        if best[name] - wanted <= _TOLERANCE:
            break
        middle = (low + high) / 2
        values = measure(_rule_at(start, middle))
        if values[name] >= wanted:
            high, best = middle, values
        else:
            low = middle
    return _rule_at(start, high), best


def _smallest_capped(
    start: Threshold, name: str, wanted: float, measure: _Measure, density: float
) -> tuple[Rule, dict[str, float]]:
    """``_smallest`` under the lowest ``max_density`` above the measured density that leaves it within reach."""
    while True:
        # Rounded up, so that the config is readable.
        density = min(1.0, math.ceil(1000 * MARGIN * density) / 1000)
        found = _smallest(dataclasses.replace(start, max_density=density), name, wanted, measure)
        if found is not None:  # at 1 at the latest, which caps nothing
            return found


def _rule_at(start: Rule, share: float) -> Rule:
    changes = {"tau": share} if isinstance(start, Threshold) else {"k": None, "density": share}
    return dataclasses.replace(start, **changes)


def _auto_is_packed(record: Record, partition: BlockPartition, rule: Rule, tail: Tail | None) -> bool:
    """Whether ``dispatch="auto"`` takes ``packed`` on a GPU, forward, for one sample and the layer's heads."""
    heads = max(record.heads) + 1  # capture records the last head, if it records more than one
    dense = dense_seconds(heads, partition.num_tokens, record.query.shape[-1], backward=False)
    return packed_wins(dense, False, rule, partition, tail)


def _measure_of(records: list[Record], config: VMoBAConfig, rows: int, seed: int) -> _Measure:
    """Mean recall and density under a rule; the true attention is computed once."""
    partitions = [layer_of(record, config)[1] for record in records]
    samples = [sample_rows(partition, rows, seed).to(records[0].query.device) for partition in partitions]
    masses = [true_mass(*one)[0] for one in zip(records, partitions, samples, strict=True)]

    def measure(rule: Rule) -> dict[str, float]:
        recalls, densities = [], []
        for record, partition, sample, mass in zip(records, partitions, samples, masses, strict=True):
            chosen = choose(record, partition, rule)
            recalls.append(recall_of(mass, chosen[:, sample]).mean().item())
            densities.append(chosen.mean(dtype=torch.float32).item())
        return {"recall": sum(recalls) / len(recalls), "density": sum(densities) / len(densities)}

    return measure
