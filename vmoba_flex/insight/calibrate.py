"""Finds the rules that reach a wanted recall, or a wanted density, on recorded query and key."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vmoba_flex.checks import check_positive
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.insight.measure import choose, layer_of, recall_of, sample_rows, true_mass
from vmoba_flex.insight.records import Record
from vmoba_flex.rules import Rule, Threshold

_TOLERANCE = 0.002
_HALVINGS = 14


class Calibrated(NamedTuple):
    """What was found for the layers of one kind.

    Attributes:
        kind: of the blocks.
        rule: the rule.
        recall: mean over records, heads and sampled queries.
        density: mean over records, heads and queries.
        records: so many went into it.
    """

    kind: str
    rule: Rule
    recall: float
    density: float
    records: int


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

    For each kind of the config's cycle, the config's rule is kept but for its ``tau``, or its number of blocks, which
    becomes a ``density``: the smallest that reaches what is wanted, by bisection, for a ``Threshold`` within 0.002
    above. A ``TopK`` moves in whole blocks, and may exceed it by as much as one block holds. Layers that the config has
    dense are left out. Recall is measured as ``inspect`` does: take several prompts and steps, since what holds for one
    video may not for the next.

    Args:
        records: of dense or sparse forwards, at least one of each kind.
        config: brings blocks, cycle, and each kind's rule, in particular its pool, ``normalize`` and ``max_density``.
        recall: wanted share of attention, in (0, 1].
        density: instead, wanted share of the pairs.
        rows: sampled queries of each record.
        seed: that draws them.

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
    kind: str, records: list[Record], config: VMoBAConfig, name: str, wanted: float,
    measure: Callable[[Rule], dict[str, float]],
) -> Calibrated:  # fmt: skip
    start = layer_of(records[0], config)[2]
    assert start is not None

    def rule_at(share: float) -> Rule:
        changes = {"tau": share} if isinstance(start, Threshold) else {"k": None, "density": share}
        return dataclasses.replace(start, **changes)

    low, high = 0.0, 1.0
    best = measure(rule_at(high))
    if best[name] < wanted - 1e-6:
        raise ValueError(f"{name} {wanted} must be within reach of {start!r}, got at most {best[name]:.3f} for {kind}")
    for _ in range(_HALVINGS):
        if best[name] - wanted <= _TOLERANCE:
            break
        middle = (low + high) / 2
        values = measure(rule_at(middle))
        if values[name] >= wanted:
            high, best = middle, values
        else:
            low = middle
    return Calibrated(kind, rule_at(high), best["recall"], best["density"], len(records))


def _measure_of(records: list[Record], config: VMoBAConfig, rows: int, seed: int) -> Callable[[Rule], dict[str, float]]:
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
