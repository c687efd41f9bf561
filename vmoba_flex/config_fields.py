"""What the fields of a config may hold: checks that return each as a frozen config keeps it."""

from collections.abc import Iterator, Mapping
from typing import Any

from vmoba_flex.approx_blocks import ApproxBlocks
from vmoba_flex.checks import check_positive
from vmoba_flex.rules import Rule, Threshold, TopK

KINDS = ("temporal", "spatial", "spatiotemporal")


class RulePerKind(Mapping[str, Rule]):
    """A mapping that a frozen config can hold: hashable, and without a way to change it."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = {kind: rules[kind] for kind in KINDS if kind in rules}

    def __getitem__(self, kind: str) -> Rule:
        return self._rules[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __hash__(self) -> int:
        return hash(tuple(self._rules.items()))

    def __repr__(self) -> str:
        return repr(self._rules)


def checked_sizes(name: str, value: Any, length: int) -> Any:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is ``ApproxBlocks`` or so many sizes, as a tuple then."""
    if isinstance(value, ApproxBlocks):
        return value
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of {length} ints or ApproxBlocks, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} sizes, got {value!r}")
    for size in value:
        check_positive(name, size)
    return tuple(value)


def checked_cycle(value: Any) -> tuple[str, ...]:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is one kind or more, as a tuple then."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"cycle must be a tuple of kinds, got {value!r}")
    if not value or any(kind not in KINDS for kind in value):
        raise ValueError(f"cycle must hold at least one kind, of {KINDS} each, got {value!r}")
    return tuple(value)


def checked_rules(value: Any, cycle: tuple[str, ...]) -> Rule | Mapping[str, Rule]:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is a rule, or has one for each kind of ``cycle``."""
    if isinstance(value, TopK | Threshold):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"rule must be a TopK, a Threshold or a mapping from kind to these, got {value!r}")
    for kind, rule in value.items():
        if kind not in KINDS:
            raise ValueError(f"rule must have keys of {KINDS}, got {kind!r}")
        if not isinstance(rule, TopK | Threshold):
            raise TypeError(f"rule must hold TopKs and Thresholds, got {rule!r} for {kind!r}")
    missing = [kind for kind in cycle if kind not in value]
    if missing:
        raise ValueError(f"rule must have every kind of cycle {cycle}, got none for {missing[0]!r} in {value!r}")
    return RulePerKind(value)
