"""Finds the rules that reach a wanted recall, or a wanted density, on recorded query and key."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vmoba_flex.checks import check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.dispatch.choose import dense_seconds, packed_share, packed_wins
from vmoba_flex.insight.measure import choose, layer_of, recall_of, sample_rows, true_mass
from vmoba_flex.insight.records import Record
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold
from vmoba_flex.tail import Tail

MARGIN = 1.25
"""``max_density`` over the density that was measured: videos may be denser by so much before it cuts."""

_TOLERANCE = 0.002
_HALVINGS = 14
_Measure = Callable[[Rule], dict[str, float]]


class Calibrated(NamedTuple):
    """What was found for the layers of one kind.

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
    """

    kind: str
    rule: Rule
    recall: float
    density: float
    records: int
    auto: str
    share: float


def calibrate(
    records: Sequence[Record],
    config: VMoBAConfig,
    *,
    recall: float | None = None,
    density: float | None = None,
    rows: int = 256,
    seed: int = 0,
) -> tuple[VMoBAConfig, list[Calibrated]]:
    """A config whose rules reach a mean recall, or a mean density, over the layers of each kind.

    For each kind of the config's cycle, bisection finds the smallest ``tau`` of its ``Threshold``, or the smallest
    ``density`` of its ``TopK``, that reaches what is wanted. A ``Threshold`` ends within 0.002 above it; a ``TopK``
    moves in whole blocks, and may exceed it by what one block holds.

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
        rows: sampled queries of each record.
        seed: of the sample.

    Returns:
        The config, and what was found for each kind.

    Raises:
        ValueError: if both or neither of ``recall`` and ``density`` are given, one is not in (0, 1], a kind has no
            records, or what is wanted cannot be reached.
    """
    if (recall is None) == (density is None):
        raise ValueError(f"exactly one of recall and density must be given, got {recall!r} and {density!r}")
    name, wanted = ("recall", recall) if recall is not None else ("density", density)
    assert wanted is not None
    if not 0 < wanted <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {wanted!r}")
    check_positive("rows", rows)
    found = []
    for kind in dict.fromkeys(config.cycle):
        here = [record for record in records if layer_of(record, config)[0] == kind]
        here = [record for record in here if layer_of(record, config)[2] is not None]
        if not here:
            raise ValueError(f"records must have a {kind} layer that is not dense in the config, got none")
        found.append(_find(kind, here, config, name, wanted, _measure_of(here, config, rows, seed)))
    rules = {one.kind: one.rule for one in found}
    return dataclasses.replace(config, rule=rules), found


def _find(
    kind: str, records: list[Record], config: VMoBAConfig, name: str, wanted: float, measure: _Measure
) -> Calibrated:
    start = layer_of(records[0], config)[2]
    assert start is not None  # of a layer that is not dense
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
