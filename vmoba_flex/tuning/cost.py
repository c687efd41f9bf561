"""What a denoise costs, counted in (query, key) pairs: a share of those of full attention."""

import math
from collections.abc import Sequence
from statistics import fmean

from vmoba_flex.config import VMoBAConfig
from vmoba_flex.fidelity.layers import LayerSteps
from vmoba_flex.rules import TopK

# Finding exact masses scores all pairs and attends none: its time on an H200 as a share of full attention's forward.
_EXACT_MASSES = 0.75


def pairs_of(config: VMoBAConfig, layers: Sequence[LayerSteps]) -> float:
    """The cost of a denoise under a config, as a share of full attention's: the mean over its layers and steps.

    What a layer attended, as it was measured; with a tail, a key for each of its cells in sparse steps; and for each
    rule whose exact masses a step finds, the time of that.
    """
    costs = []
    models = {layer.model for layer in layers}
    counts = {model: sum(layer.model == model for layer in layers) for model in models}
    for layer in layers:
        for step, density in enumerate(layer.density):
            if density is not None:
                costs.append(density + _extra(config, layer.layer, counts[layer.model], step, len(layer.density)))
    return fmean(costs)


def expected_pairs(config: VMoBAConfig, num_layers: int, num_steps: int) -> float:
    """The same before the denoise, from the densities that rules name."""
    costs = []
    for i in range(num_layers):
        for step in range(num_steps):
            layer = config.layer(i, num_layers, step, num_steps)
            named = layer.rule.density if isinstance(layer.rule, TopK) else layer.rule.max_density
            density = 1.0 if layer.dense or named is None else named
            costs.append(density + _extra(config, i, num_layers, step, num_steps))
    return fmean(costs)


def _extra(config: VMoBAConfig, i: int, num_layers: int, step: int, num_steps: int) -> float:
    """What a layer's step costs in addition to what it attends exactly."""
    layer = config.layer(i, num_layers, step, num_steps)
    cost = _EXACT_MASSES * len(layer.records)
    if layer.tail is not None and not layer.dense:
        cell = layer.tail.cell
        cost += 1 / (cell if isinstance(cell, int) else math.prod(cell))
    return cost
