"""The smallest rule that reaches what is wanted, by bisection."""

import dataclasses
import math
from collections.abc import Callable

from vmoba_flex.rules import Rule, Threshold

MARGIN = 1.25
"""``max_density`` over the density that was measured: videos may be denser by so much before it cuts."""

_TOLERANCE = 0.002
_HALVINGS = 14
Measure = Callable[[Rule, bool], dict[str, float]]  # with overlap, which takes another pass over the keys, or without


def smallest(start: Rule, name: str, wanted: float, measure: Measure) -> tuple[Rule, dict[str, float]] | None:
    """The smallest ``tau`` or ``density`` that reaches what is wanted, and its values; None if none does."""
    low, high, overlap = 0.0, 1.0, name == "overlap"
    best = measure(rule_at(start, high), overlap)
    if best[name] < wanted - 1e-6:
        return None
    for _ in range(_HALVINGS):
        if best[name] - wanted <= _TOLERANCE:
            break
        middle = (low + high) / 2
        values = measure(rule_at(start, middle), overlap)
        if values[name] >= wanted:
            high, best = middle, values
        else:
            low = middle
    return rule_at(start, high), best


def smallest_capped(
    start: Threshold, name: str, wanted: float, measure: Measure, density: float
) -> tuple[Rule, dict[str, float]]:
    """``smallest`` under the lowest ``max_density`` above the measured density that leaves it within reach."""
    while True:
        # Rounded up, so that the config is readable.
        density = min(1.0, math.ceil(1000 * MARGIN * density) / 1000)
        found = smallest(dataclasses.replace(start, max_density=density), name, wanted, measure)
        if found is not None:  # at 1 at the latest, which caps nothing
            return found


def rule_at(start: Rule, share: float) -> Rule:
    """``start`` with this ``tau``, or this ``density``."""
    changes = {"tau": share} if isinstance(start, Threshold) else {"k": None, "density": share}
    return dataclasses.replace(start, **changes)
