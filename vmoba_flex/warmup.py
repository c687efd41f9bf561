"""A schedule for training: from full attention to a config's thresholds, without a graph made anew."""

import dataclasses

import torch
from torch import Tensor

from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.rules import FlatRule, Rule, Threshold, TopK


@dataclasses.dataclass(frozen=True)
class Warmup:
    """How far a training step is on the way from full attention to the thresholds of a config.

    ``VMoBAHandle.set_warmup`` and ``VMoBAAttention.set_warmup`` take what ``at`` returns. A share ``s`` above 0 stands
    for thresholds ``1 - s (1 - tau)``; at 0 layers do not choose at all: they run full attention on its own kernels. A
    ``max_density`` holds throughout, since it bounds memory: with it density falls at once to the cap, and on from
    there. Without it density falls gradually from 1, and where "packed" is compiled or must not read the device, take
    the dispatch "tiles" or "shared" meanwhile.

    Attributes:
        steps: over which thresholds fall, linearly.
        dense_steps: before these, full attention for so many.

    Raises:
        TypeError: if one is no int.
        ValueError: if ``steps`` is below 1, or ``dense_steps`` below 0.

    Example:
        >>> schedule = Warmup(steps=1000, dense_steps=200)
        >>> [schedule.at(step) for step in (0, 200, 700, 1200, 5000)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    steps: int
    dense_steps: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("steps", self.steps)
        check_count("dense_steps", self.dense_steps)

    def at(self, step: int) -> float:
        """The share of the way behind at a training step, which counts from 0: 0 to 1."""
        check_count("step", step)
        return min(1.0, max(0.0, (step - self.dense_steps) / self.steps))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WarmedThreshold(Threshold):
    """A threshold whose tau is read as it is applied: to a compiled graph it is an input, and no constant.

    Attributes:
        now: the tau in force, float64 ``(1,)`` on the CPU; of no dims, Dynamo would take it for a Python float.
    """

    now: Tensor = dataclasses.field(default_factory=lambda: torch.ones(1, dtype=torch.float64), kw_only=True)

    @property
    def flat(self) -> FlatRule:
        """The rule, as the schema of a custom op takes it."""
        return self._flat(self.now)

    def warm(self, share: float) -> None:
        """Sets the tau of a share of the way from 1 to ``tau``."""
        self.now.fill_(1 - share * (1 - self.tau))

    def __repr__(self) -> str:
        return repr(Threshold(self.now.item(), pool=self.pool, max_density=self.max_density, normalize=self.normalize))


def rule_of_flat(words: str, counts: list[int], shares: list[float], now: Tensor | None) -> Rule:
    """The rule with this ``flat`` form."""
    if words.startswith("topk"):
        return TopK.of_flat(words, counts, shares)
    rule = Threshold.of_flat(words, shares)
    return rule if now is None else WarmedThreshold(**vars(rule), now=now)


def warmed(rule: Rule) -> WarmedThreshold:
    """A ``Threshold`` as one that can be warmed.

    Raises:
        ValueError: if ``rule`` is a ``TopK``.
    """
    if not isinstance(rule, Threshold):
        raise ValueError(f"rule must be a Threshold to be warmed up, got {rule!r}")
    return rule if isinstance(rule, WarmedThreshold) else WarmedThreshold(**vars(rule))


def check_warmup(share: float) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``share`` is a share of the way."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"share must be a number, got {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}")
