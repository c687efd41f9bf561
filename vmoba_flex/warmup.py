"""A schedule for training, from full attention to a config's thresholds, that compiles nothing again."""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from vmoba_flex.checks import check_count, check_positive
from vmoba_flex.rules import FlatRule, Rule, Threshold, TopK


@dataclasses.dataclass(frozen=True)
class Warmup:
    """How far a training step is on the way from full attention to the thresholds of a config.

    ``VMoBAHandle.set_warmup`` and ``VMoBAAttention.set_warmup`` take what ``at`` returns. A share ``s`` above 0 stands
    for thresholds ``1 - s (1 - tau)``; 0 stands for full attention on its own kernels. A ``max_density`` bounds memory,
    so it holds throughout: density falls to the cap at once, and on from it. Without a ``max_density``, density falls
    gradually from 1; where "packed" is compiled or must not read the device, take "tiles" or "shared" until then.

    Attributes:
        steps: training steps over which thresholds fall, linearly.
        dense_steps: training steps of full attention before these.

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
        """The share of the way, 0 to 1, that is done at a training step, counted from 0."""
        check_count("step", step)
        return min(max(step - self.dense_steps, 0), self.steps) / self.steps


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WarmedThreshold(Threshold):
    """A threshold whose tau is an input of compiled graphs, and no constant of theirs.

    Attributes:
        now: the tau in force, float64 ``(1,)`` on the CPU. With no dims, Dynamo would take it for a Python float.
    """

    now: Tensor = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, rule: Threshold, share: float) -> Self:
        """``rule`` with the tau of a share of the way from 1 to its own."""
        fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(Threshold)}
        with torch.inference_mode(False):  # compiled graphs would tell an inference tensor from others
            now = torch.tensor([1 - share * (1 - rule.tau)], dtype=torch.float64, device="cpu")
        return cls(**fields, now=now)

    @property
    def flat(self) -> FlatRule:
        """The rule, as the schema of a custom op takes it."""
        return self._flat(self.now)

    def __repr__(self) -> str:
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Threshold)}
        fields["tau"] = self.now.item()
        return repr(Threshold(**fields))


def rule_of_flat(words: str, counts: list[int], shares: list[float], now: Tensor | None) -> Rule:
    """The rule with this ``flat`` form."""
    if words.startswith("topk"):
        return TopK.of_flat(words, counts, shares)
    rule = Threshold.of_flat(words, counts, shares)
    return rule if now is None else WarmedThreshold(**vars(rule), now=now)


def warmed(rule: Rule, share: float) -> WarmedThreshold:
    """A ``Threshold`` as far on its way as ``share`` says.

    Raises:
        ValueError: if ``rule`` is a ``TopK``.
    """
    if not isinstance(rule, Threshold):
        raise ValueError(f"rule must be a Threshold to be warmed up, got {rule!r}")
    return WarmedThreshold.of(rule, share)


def check_warmup(share: float) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``share`` is a share of the way."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"share must be a number, got {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}")
