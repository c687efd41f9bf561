"""A value that changes over the denoising steps, such as a density that falls."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from vmoba_flex.checks import check_count, check_number, check_positive, is_int
from vmoba_flex.dense_schedule import is_within

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, repr=False)
class BySteps(Generic[T]):
    """One value after another over the denoising steps of a run.

    Each entry holds from its start on: a step (int, from 0), or a share of all steps below 1 (float). A share starts at
    the first step that has at least this share of the steps before it. Of the entries that have started, the last one
    holds. Dense steps count as steps.

    Attributes:
        entries: a mapping from start to value, kept as a tuple of pairs. The first start is 0; steps rise, and shares
            rise.

    Raises:
        TypeError: if ``entries`` is no mapping, or a start is no number.
        ValueError: if it is empty, or a start is out of range or out of order.

    Example:
        >>> density = BySteps({0: 0.25, 0.25: 0.125, 0.75: 0.0625})
        >>> [density.at(step, num_steps=8) for step in range(8)]
        [0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.0625, 0.0625]
    """

    entries: Mapping[int | float, T] | Sequence[tuple[int | float, T]]

    def __post_init__(self) -> None:
        entries = self.entries.items() if isinstance(self.entries, Mapping) else self.entries
        if not isinstance(self.entries, Mapping | tuple | list) or any(
            not isinstance(entry, tuple | list) or len(entry) != 2 for entry in entries
        ):
            raise TypeError(f"entries of BySteps must be a mapping from start to value, got {self.entries!r}")
        pairs = tuple((_checked_start(start), value) for start, value in entries)
        if not pairs or pairs[0][0] != 0:
            raise ValueError(f"entries of BySteps must have 0 as their first start, got {self.entries!r}")
        for kind in (int, float):
            starts = [start for start, _ in pairs if isinstance(start, kind)]
            if any(later <= start for start, later in itertools.pairwise(starts)):
                raise ValueError(f"entries of BySteps must have steps that rise, and shares that rise, got {starts}")
        object.__setattr__(self, "entries", pairs)

    @property
    def values(self) -> tuple[T, ...]:
        """The values in their order."""
        return tuple(value for _, value in self.pairs)

    def at(self, step: int | None, num_steps: int | None = None) -> T:
        """The value at a step; see ``index``."""
        return self.values[self.index(step, num_steps)]

    def index(self, step: int | None, num_steps: int | None = None) -> int:
        """Which entry holds at a step.

        Args:
            step: from 0.
            num_steps: denoising steps in all. Needed where a start is a share above 0.

        Raises:
            TypeError: if one is not an int.
            ValueError: if one that is needed is None, or one is out of range.
        """
        if step is None:
            raise ValueError(f"step must be given where a setting changes by steps, {self!r}, got None")
        if num_steps is None and any(isinstance(start, float) for start, _ in self.pairs):
            raise ValueError(f"num_steps must be given where a setting changes at a share of them, {self!r}, got None")
        if num_steps is not None:
            check_positive("num_steps", num_steps)
        check_count("step", step, num_steps, "num_steps")
        started = [i for i, (start, _) in enumerate(self.pairs) if not is_within(step, start, num_steps or 1)]
        return started[-1]

    @property
    def pairs(self) -> tuple[tuple[int | float, T], ...]:
        """Each start with its value."""
        pairs: Any = self.entries  # __post_init__ has made it this
        return pairs

    def __repr__(self) -> str:
        return f"BySteps({dict(self.pairs)!r})"


def values_of(setting: T | BySteps[T]) -> tuple[T, ...]:
    """All values of a setting that may change by steps."""
    return setting.values if isinstance(setting, BySteps) else (setting,)


def value_at(setting: T | BySteps[T], step: int | None, num_steps: int | None) -> T:
    """The value at a step of a setting that may change by steps.

    Raises:
        ValueError: if ``step`` or ``num_steps`` is needed, and None.
    """
    by_steps: Any = setting  # a type checker cannot tell T from BySteps[T]
    return by_steps.at(step, num_steps) if isinstance(setting, BySteps) else by_steps


def _checked_start(start: Any) -> int | float:
    name = "a start in entries of BySteps"
    number = start if is_int(start) else check_number(name, start, "a step (int) or a share (float)")
    if number < 0 or (isinstance(number, float) and not number < 1):
        raise ValueError(f"{name} must be a step (int) or a share in [0, 1) (float), got {start!r}")
    return number if number else 0  # 0.0 needs no number of steps
