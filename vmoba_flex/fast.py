"""The setting with the fewest pairs for inference without training: the one place to change it."""

from typing import Any

from vmoba_flex.by_steps import BySteps
from vmoba_flex.paper import blocks_at
from vmoba_flex.remember import Remember
from vmoba_flex.rules import TopK
from vmoba_flex.tail import Tail

_DENSE_STEPS = 0.25
_DENSITIES = {0: 0.125, 0.5: 0.0625}


def fast_arguments(grid: tuple[int, int, int] | None) -> dict[str, Any]:
    """Arguments of ``VMoBAConfig``; see ``VMoBAConfig.fast``.

    Raises:
        TypeError: if ``grid`` has a wrong type.
        ValueError: if ``grid`` is not three sizes of at least 1.
    """
    rule = BySteps({start: TopK(density=density, gate="spread") for start, density in _DENSITIES.items()})
    return blocks_at(grid) | {"rule": rule, "dense_steps": _DENSE_STEPS, "tail": Tail(), "remember": Remember()}
