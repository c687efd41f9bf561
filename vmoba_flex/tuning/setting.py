"""What is varied in tuning: a setting -> a config."""

import dataclasses
import math
from typing import Literal

from vmoba_flex.by_steps import BySteps
from vmoba_flex.config import VMoBAConfig
from vmoba_flex.config_fields import LayerRule
from vmoba_flex.remember import CHOOSES_ONCE, Remember
from vmoba_flex.rules import Rule, Threshold, TopK
from vmoba_flex.tail import Tail

Choice = Literal["mean", "spread", "remembered", "remembered by head", "remembered by layer"]
"""What blocks are chosen by: a gate, or the exact masses that a dense step found, for each query or with one budget for
all queries of a head, or for all heads of a layer, so that heads with spread-out attention get more."""

DENSITIES = (0.5, 0.375, 0.25, 0.1875, 0.125, 0.09, 0.0625, 0.045, 0.031)
"""What is tried, the most faithful first."""
DENSE = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0)
"""Shares of dense first steps that are tried."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the search.

    Attributes:
        dense: share of the steps, the first ones, that attend everything.
        density: place in ``DENSITIES``, of all kinds of layers.
        choice: what blocks are chosen by.
        tail: whether skipped blocks take part.
        falls: whether densities fall to half from half of the steps on.
        lower: for each kind of layers that has another density, how many places lower.
    """

    dense: float = 0.25
    density: int = DENSITIES.index(0.25)
    choice: Choice = "mean"
    tail: bool = False
    falls: bool = False
    lower: tuple[tuple[str, int], ...] = ()

    def config(self, base: VMoBAConfig) -> VMoBAConfig:
        """``base`` with these rules, dense steps, tail and memory; it keeps its blocks, dense layers and dispatch."""
        rules = {kind: self._rule(kind) for kind in dict.fromkeys(base.cycle)}
        remembers = self.choice.startswith("remembered")
        return dataclasses.replace(
            base,
            rule=rules if len(set(rules.values())) > 1 else next(iter(rules.values())),
            dense_steps=self.dense or 0,
            tail=Tail() if self.tail else None,
            remember=(Remember() if self.dense else CHOOSES_ONCE) if remembers else None,
        )

    def dense_steps(self, num_steps: int) -> int:
        """How many steps of a run are dense."""
        return math.ceil(round(self.dense * num_steps, 9))

    def lowered(self, kind: str) -> "Setting":
        """The next lower density for a kind of layers."""
        places = dict(self.lower)
        places[kind] = places.get(kind, 0) + 1
        return dataclasses.replace(self, lower=tuple(sorted(places.items())))

    @property
    def fits(self) -> bool:
        """Whether each kind has a density that is tried."""
        return self.density + max((places for _, places in self.lower), default=0) < len(DENSITIES)

    def __str__(self) -> str:
        words = [f"{self.dense:g} dense", f"density {DENSITIES[self.density]:g}"]
        words += [f"{kind} {DENSITIES[self.density + places]:g}" for kind, places in self.lower]
        words += ["half from half of the steps on"] if self.falls else []
        chosen = self.choice if self.choice.startswith("remembered") else f"{self.choice} gate"
        return ", ".join([*words, chosen, *(["tail"] if self.tail else [])])

    def _rule(self, kind: str) -> LayerRule:
        density = DENSITIES[self.density + dict(self.lower).get(kind, 0)]
        first = self._at(density)
        return BySteps({0: first, 0.5: self._at(density / 2)}) if self.falls else first

    def _at(self, density: float) -> Rule:
        match self.choice:
            case "mean":
                return TopK(density=density)
            case "spread" | "remembered":
                return TopK(density=density, gate="spread")
            case "remembered by head":
                pool = "head"
            case "remembered by layer":
                pool = "global"
        # It never reaches all of the mass: the cap decides, and the best pairs of the pool fill it.
        return Threshold(1.0, pool=pool, normalize="softmax", max_density=density, gate="spread")
