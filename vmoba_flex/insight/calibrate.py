"""Finds the rules that reach a wanted recall, overlap or density, on recorded query and key."""

import dataclasses
from collections.abc import Sequence
from statistics import mean
from typing import Literal, NamedTuple, get_args

import torch

from vmoba_flex.by_steps import BySteps
from vmoba_flex.checks import check_choice, check_share
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_fields import LayerRule, rule_of_layer
from vmoba_flex.dispatch.choose import dense_seconds, packed_share, packed_wins
from vmoba_flex.dispatch.machine import HOPPER, machine_of
from vmoba_flex.insight.masses import overlap_of, recall_of, true_mass
from vmoba_flex.insight.measure import check_sample, choose, layer_of, num_layers_of, sample_rows
from vmoba_flex.insight.places import by_entry, by_kind, by_layer, rule_of_each_layer
from vmoba_flex.insight.records import Record, check_records
from vmoba_flex.insight.search import Measure, rule_at, smallest, smallest_capped
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import GATES, Gate, Rule, Threshold
from vmoba_flex.tail import Tail

By = Literal["kind", "layer"]
_BY: tuple[By, ...] = get_args(By)


class Calibrated(NamedTuple):
    """What was found for the layers of one kind, or one layer; of rules that change by steps, for one of them.

    Attributes:
        kind: of the blocks.
        rule: the rule.
        recall: mean over records, heads and sampled queries.
        overlap: the same mean; see ``HeadReport``. Without a tail it is the recall.
        density: mean over records, heads and queries.
        records: the number of records.
        auto: what ``dispatch="auto"`` takes on a GPU at the records' sizes, forward: ``"packed"`` or ``"dense"``.
        share: estimated time of ``packed`` as a share of full attention's, by which ``auto`` decides: at the largest
            density that the rule allows. ``auto`` also takes ``"dense"`` where full attention takes less time than
            launching ``packed``.
        layer: the layer, where each has a rule of its own; None for all of the kind.
        start: from which step or share of the steps on the rule holds; None for all steps.
        kept: whether the config has this rule: one of those with other gates may be better.
    """

    kind: str
    rule: Rule
    recall: float
    overlap: float
    density: float
    records: int
    auto: str
    share: float
    layer: int | None = None
    start: int | float | None = None
    kept: bool = True


def calibrate(
    records: Sequence[Record],
    config: VMoBAConfig,
    *,
    recall: float | None = None,
    overlap: float | None = None,
    density: float | None = None,
    by: By = "kind",
    gates: Sequence[Gate] = (),
    rows: int = 256,
    seed: int = 0,
) -> tuple[VMoBAConfig, list[Calibrated]]:
    """A config whose rules reach a mean recall, overlap or density over the layers of each kind, or in each layer.

    For each kind of the config's cycle, or each layer, bisection finds the smallest ``tau`` of its ``Threshold``, or
    the smallest ``density`` of its ``TopK``, that reaches what is wanted. Of a rule that changes by steps, it finds
    each entry's, on the records of the steps at which the entry holds: a recall then decides how densities fall. A
    ``Threshold`` ends within 0.002 above it; a ``TopK`` moves in whole blocks, and may exceed it by what one block
    holds.

    A ``Threshold`` without ``max_density`` gets one, since ``dispatch="auto"`` cannot bound its cost otherwise and
    takes full attention: 1.25 times the measured density, or 1.25 times that until recall is within reach. It also
    holds on the recordings: a pool that would keep more is cut.

    Layers that the config has dense are left out. Recall, and overlap under the config's tail, are measured as
    ``inspect`` does: record several prompts and steps, because what holds for one video may not for the next.

    Args:
        records: of dense or sparse forwards, at least one of each kind.
        config: brings blocks, cycle, dense layers and steps, and each kind's rule with its pool, ``normalize`` and
            ``max_density``, all of which are kept.
        recall: wanted share of attention on chosen blocks and text, in (0, 1].
        overlap: wanted overlap with full attention, in (0, 1], in place of ``recall``: with a tail, what counts.
        density: wanted share of the pairs, in place of ``recall``.
        by: ``"kind"`` for one rule for each kind, ``"layer"`` for one for each layer, which needs records of all layers
            that are not dense.
        gates: to compare, in place of each rule's own. Of these each rule gets the one with the fewest pairs, or, where
            a density is wanted, the largest overlap; ``"exact"`` only where the config remembers, or next to no other.
        rows: sampled queries of each record.
        seed: of the sample.

    Returns:
        The config, and what was found for each kind or layer, entry by entry, gate by gate.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: unless one of ``recall``, ``overlap`` and ``density`` is given, or if it is not in (0, 1], ``by`` is
            unknown, a kind, layer or entry has no records, or what is wanted cannot be reached.
    """
    given = {"recall": recall, "overlap": overlap, "density": density}
    asked = [(name, value) for name, value in given.items() if value is not None]
    if len(asked) != 1:
        words = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"exactly one of recall, overlap and density must be given, got {words}")
    ((name, wanted),) = asked
    wanted = check_share(name, wanted)
    check_records(records)
    if not isinstance(config, VMoBAConfig):
        raise TypeError(f"config must be a VMoBAConfig, got {type(config).__name__}")
    check_sample(rows, seed)
    check_choice("by", by, _BY)
    if not isinstance(gates, list | tuple):
        raise TypeError(f"gates must be a list of gates, got {gates!r}")
    sparse = [record for record in records if layer_of(record, config)[2] is not None]
    for gate in gates:
        check_choice("gates", gate, GATES)
    found: list[Calibrated] = []
    of_kinds: dict[str, LayerRule] = {}
    of_layers = rule_of_each_layer(records, config) if by == "layer" else []
    for kind, layer, here in by_layer(sparse, config, len(of_layers)) if by == "layer" else by_kind(sparse, config):
        setting = rule_of_layer(config.rule, kind, here[0].layer, num_layers_of(here[0], config))
        pairs = []
        for start, rule, there in by_entry(setting, here, kind if layer is None else f"layer {layer}"):
            measure = _measure_of(there, config, rows, seed)
            with_gates = [dataclasses.replace(rule, gate=gate) for gate in gates or (rule.gate,)]
            tried = [_find(kind, each, there, config, name, wanted, measure) for each in with_gates]
            # As a gate of each call, "exact" costs most of a dense forward; next to others it shows what they miss.
            worth = [one for one in tried if one.rule.gate != "exact" or config.remember] or tried
            best = min(worth, key=lambda one: -one.overlap if name == "density" else one.density)
            found += [one._replace(layer=layer, start=start, kept=one is best) for one in tried]
            pairs.append((start, best.rule))
        rule = BySteps(pairs) if isinstance(setting, BySteps) else pairs[0][1]
        if layer is None:
            of_kinds[kind] = rule
        else:
            of_layers[layer] = rule
    return dataclasses.replace(config, rule=of_layers or of_kinds), found


def _find(
    kind: str, start: Rule, records: list[Record], config: VMoBAConfig, name: str, wanted: float, measure: Measure
) -> Calibrated:
    found = smallest(start, name, wanted, measure)
    if found is None:
        most = measure(rule_at(start, 1.0), name == "overlap")[name]
        raise ValueError(f"{name} {wanted} must be within reach of {start!r}, got at most {most:.3f} for {kind}")
    if isinstance(start, Threshold) and start.max_density is None:
        found = smallest_capped(start, name, wanted, measure, found[1]["density"])
    rule, values = found
    values |= measure(rule, True)
    layers = [layer_of(record, config) for record in records]
    share = max(packed_share(rule, partition, tail) for _, partition, _, tail in layers)
    wins = all(
        _auto_is_packed(record, partition, rule, tail)
        for record, (_, partition, _, tail) in zip(records, layers, strict=True)
    )
    auto = "packed" if wins else "dense"
    return Calibrated(kind, rule, values["recall"], values["overlap"], values["density"], len(records), auto, share)


def _auto_is_packed(record: Record, partition: BlockPartition, rule: Rule, tail: Tail | None) -> bool:
    """Whether ``dispatch="auto"`` takes ``packed`` on a GPU, forward, for one sample and the layer's heads."""
    heads = max(record.heads) + 1  # capture records the last head, if it records more than one
    machine = machine_of(record.query.device) if record.query.is_cuda else HOPPER
    dense = dense_seconds(heads, partition.num_tokens, record.query.shape[-1], False, machine)
    return packed_wins(dense, False, rule, partition, tail, machine)


def _measure_of(records: list[Record], config: VMoBAConfig, rows: int, seed: int) -> Measure:
    """Mean recall, density and, if asked for, overlap under a rule; the true masses are computed once."""
    layers = [layer_of(record, config) for record in records]
    samples = [sample_rows(partition, rows, seed).to(records[0].query.device) for _, partition, _, _ in layers]
    masses = [
        true_mass(record, partition, sample)
        for record, (_, partition, _, _), sample in zip(records, layers, samples, strict=True)
    ]

    def measure(rule: Rule, overlap: bool) -> dict[str, float]:
        found: dict[str, list[float]] = {"recall": [], "density": []} | ({"overlap": []} if overlap else {})
        for record, (_, partition, _, tail), sample, mass in zip(records, layers, samples, masses, strict=True):
            chosen = choose(record, partition, rule)
            recall = recall_of(mass, chosen[:, sample])
            found["recall"].append(recall.mean().item())
            found["density"].append(chosen.mean(dtype=torch.float32).item())
            if overlap:
                shares = recall
                if tail is not None:
                    shares = overlap_of(record, partition, sample, chosen[:, sample], tail)
                found["overlap"].append(shares.mean().item())
        return {name: mean(values) for name, values in found.items()}

    return measure
