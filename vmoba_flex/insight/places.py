"""What has a rule of its own in a config, and the records of it: kinds or layers, and entries of ``BySteps``."""

import dataclasses
from collections.abc import Iterator, Sequence

from vmoba_flex.by_steps import BySteps
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_fields import LayerRule, rule_of_layer
from vmoba_flex.insight.measure import layer_of, num_layers_of
from vmoba_flex.insight.records import Record
from vmoba_flex.rules import Rule


def rule_of_each_layer(records: Sequence[Record], config: VMoBAConfig) -> list[LayerRule]:
    """Each layer's rule as the config has it."""
    counts = {num_layers_of(record, config) for record in records}
    if len(counts) != 1:
        raise ValueError(f"records must be of models with one number of layers for by='layer', got {sorted(counts)}")
    (count,) = counts
    kinds = [config.cycle[layer % len(config.cycle)] for layer in range(count)]
    return [rule_of_layer(config.rule, kind, layer, count) for layer, kind in enumerate(kinds)]


def by_kind(records: list[Record], config: VMoBAConfig) -> Iterator[tuple[str, None, list[Record]]]:
    """Each kind of the cycle, with its records; no layer."""
    for kind in dict.fromkeys(config.cycle):
        here = [record for record in records if layer_of(record, config)[0] == kind]
        if not here:
            raise ValueError(f"records must have a {kind} layer that is not dense in the config, got none")
        yield kind, None, here


def by_layer(records: list[Record], config: VMoBAConfig, count: int) -> Iterator[tuple[str, int, list[Record]]]:
    """Each layer that is not dense, with its kind and its records."""
    for layer in range(count):
        if dataclasses.replace(config, dense_steps=0, remember=None).layer(layer, count, 0, 1).dense:
            continue
        here = [record for record in records if record.layer == layer]
        if not here:
            raise ValueError(f"records must have layer {layer}, which is not dense in the config, got none")
        yield config.cycle[layer % len(config.cycle)], layer, here


def by_entry(
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
