"""What the fields of a config may hold: checks that return each as a frozen config keeps it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmoba_flex.approx_blocks import ApproxBlocks, approx_block
from vmoba_flex.by_steps import BySteps, values_of
from vmoba_flex.call import BACKENDS, DISPATCHES
from vmoba_flex.checks import check_choice, check_positive
from vmoba_flex.dense_schedule import checked_layers, checked_steps
from vmoba_flex.remember import Remember
from vmoba_flex.rules import Rule, Threshold, TopK
from vmoba_flex.tail import Tail

KINDS = ("temporal", "spatial", "spatiotemporal")

# The axes of the grid (frames, height, width) that a kind cuts; its blocks are as long as the grid along the others.
_AXES = {"temporal": (0,), "spatial": (1, 2), "spatiotemporal": (0, 1, 2)}

# A layer's rule, and what a config takes: one for all layers, one for each kind, or one for each layer.
LayerRule = Rule | BySteps[Rule]
Rules = LayerRule | Mapping[str, LayerRule] | Sequence[LayerRule]


class RulePerKind(Mapping[str, LayerRule]):
    """A mapping that a frozen config can hold: hashable, and without a way to change it."""

    def __init__(self, rules: Mapping[str, LayerRule]) -> None:
        self._rules = {kind: rules[kind] for kind in KINDS if kind in rules}

    def __getitem__(self, kind: str) -> LayerRule:
        return self._rules[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __hash__(self) -> int:
        return hash(tuple(self._rules.items()))

    def __repr__(self) -> str:
        return repr(self._rules)


def checked_fields(config: Any) -> dict[str, Any]:
    """Checked fields of a ``VMoBAConfig``, as it keeps them: lists are welcome, but a frozen object must be hashable.

    Raises:
        TypeError: if a field has a wrong type.
        ValueError: if a field is out of range.
    """
    if not isinstance(config.temporal, ApproxBlocks):
        check_positive("temporal", config.temporal)
    cycle, steps = checked_cycle(config.cycle), checked_steps(config.dense_steps)
    check_choice("dispatch", config.dispatch, DISPATCHES)
    check_choice("backend", config.backend, BACKENDS)
    check_tails(config.tail, config.dispatch)
    check_remember(config.remember, config.dispatch, steps)
    return {
        "spatial": checked_sizes("spatial", config.spatial, 2),
        "spatiotemporal": checked_sizes("spatiotemporal", config.spatiotemporal, 3),
        "cycle": cycle,
        "rule": checked_rules(config.rule, cycle),
        "dense_layers": checked_layers(config.dense_layers),
        "dense_steps": steps,
    }


def checked_sizes(name: str, value: Any, length: int) -> Any:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is ``ApproxBlocks`` or sizes; these as a tuple."""
    if isinstance(value, ApproxBlocks):
        return value
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of {length} ints or ApproxBlocks, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} sizes, got {value!r}")
    for size in value:
        check_positive(name, size)
    return tuple(value)


def block_on(grid: tuple[int, int, int], kind: str, sides: Any) -> tuple[int, int, int]:
    """A kind's block on a grid, by its field of a config.

    Raises:
        ValueError: if the block is larger than the grid.
    """
    if isinstance(sides, ApproxBlocks):
        return approx_block(sides.count, grid, _AXES[kind])
    (bt, bh, bw), cut = grid, (sides,) if kind == "temporal" else sides
    block = {"temporal": (*cut, bh, bw), "spatial": (bt, *cut), "spatiotemporal": cut}[kind]
    if any(side > size for side, size in zip(block, grid, strict=True)):
        raise ValueError(
            f"{kind} block must not be larger than grid {grid}, got {block}: take smaller blocks, or "
            f"{kind}=ApproxBlocks(count), which fits any grid, as all blocks of VMoBAConfig.paper(setting) do"
        )
    return block


def checked_cycle(value: Any) -> tuple[str, ...]:
    """Raises ``TypeError`` or ``ValueError`` unless ``value`` is kinds, at least one; as a tuple."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"cycle must be a tuple of kinds, got {value!r}")
    if not value or any(kind not in KINDS for kind in value):
        raise ValueError(f"cycle must hold at least one kind, of {KINDS} each, got {value!r}")
    return tuple(value)


def checked_rules(value: Any, cycle: tuple[str, ...]) -> Rules:
    """The rules as a config keeps them.

    Raises:
        TypeError: if ``value`` holds what is no rule.
        ValueError: if a mapping has an unknown kind or lacks one of ``cycle``, or a list of layers is empty.
    """
    if isinstance(value, Mapping):
        for kind, rule in value.items():
            if kind not in KINDS:
                raise ValueError(f"rule must have keys of {KINDS}, got {kind!r}")
            _check_rule(rule, f" for {kind!r}")
        missing = [kind for kind in cycle if kind not in value]
        if missing:
            raise ValueError(f"rule must have every kind of cycle {cycle}, got none for {missing[0]!r} in {value!r}")
        return RulePerKind(value)
    if isinstance(value, tuple | list):
        if not value:
            raise ValueError(f"rule must have one entry for each layer, got {value!r}")
        for layer, rule in enumerate(value):
            _check_rule(rule, f" for layer {layer}")
        return tuple(value)
    if isinstance(value, BySteps):
        _check_rule(value, "")
    elif not isinstance(value, TopK | Threshold):
        raise TypeError(
            "rule must be a TopK, a Threshold, BySteps of these, a mapping from kind to these or a list with one for "
            f"each layer, got {value!r}"
        )
    return value


def _check_rule(value: Any, where: str) -> None:
    for rule in values_of(value):
        if not isinstance(rule, TopK | Threshold):
            raise TypeError(f"rule must hold TopKs and Thresholds, got {rule!r}{where}")


def check_tails(value: Any, dispatch: str) -> None:
    """Checks ``tail`` next to the dispatch.

    Raises:
        TypeError: if it is neither a tail, nor None, nor ``BySteps`` of these.
        ValueError: if there is one for ``"dense"``.
    """
    for tail in values_of(value):
        if tail is not None and not isinstance(tail, Tail):
            raise TypeError(f"tail must be a Tail or None, or BySteps of these, got {value!r}")
        if tail is not None and dispatch == "dense":
            raise ValueError(f"tail must be None for dispatch='dense', which skips no block, got {value}")


def check_remember(value: Any, dispatch: str, dense_steps: Any) -> None:
    """Checks ``remember`` next to the dispatch and the dense steps.

    Raises:
        TypeError: if it is neither a ``Remember`` nor None.
        ValueError: if no step would choose what is remembered, or none would use it.
    """
    if value is None:
        return
    if not isinstance(value, Remember):
        raise TypeError(f"remember must be a Remember or None, got {value!r}")
    if dispatch == "dense":
        raise ValueError(f"remember must be None for dispatch='dense', which chooses no block, got {value}")
    first = dense_steps[0] if isinstance(dense_steps, tuple) else dense_steps
    if not first and value.refresh is None:
        raise ValueError(
            "remember must come with dense first steps, such as dense_steps=0.25, or with Remember(refresh=n): no step "
            f"would choose what is remembered, got {value} and dense_steps={dense_steps}"
        )


def rule_of_layer(rules: Rules, kind: str, i: int, num_layers: int) -> LayerRule:
    """The rule of layer i, which has ``kind``.

    Raises:
        ValueError: if there is one for each layer, but of another number of layers.
    """
    if isinstance(rules, Mapping):
        return rules[kind]
    if isinstance(rules, tuple):
        if len(rules) != num_layers:
            raise ValueError(f"rule must have one entry for each layer, num_layers = {num_layers}, got {len(rules)}")
        return rules[i]
    single: Any = rules  # __post_init__ has left no other sequence
    return single


def rules_of_layers(rules: Rules) -> tuple[LayerRule, ...]:
    """The rules that a config has for its layers, each kind's or each layer's."""
    if isinstance(rules, Mapping):
        return tuple(rules.values())
    single: Any = rules
    return rules if isinstance(rules, tuple) else (single,)
