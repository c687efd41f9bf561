"""What a whole model's layers do: block shapes, rules, and which layers and steps stay dense."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

from vmoba_flex import config_json
from vmoba_flex.approx_blocks import ApproxBlocks, approx_block
from vmoba_flex.checks import check_choice, check_count, check_positive
from vmoba_flex.dispatch.choose import BACKENDS, DISPATCHES
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import Rule, Threshold, TopK

KINDS = ("temporal", "spatial", "spatiotemporal")
SETTINGS = ("training", "inference")

# The axes of the grid (frames, height, width) that a kind cuts; its blocks are as long as the grid along the others.
_AXES = {"temporal": (0,), "spatial": (1, 2), "spatiotemporal": (0, 1, 2)}

# arXiv 2506.23858: block shapes per kind at a grid, and k where inference without training was run there.
_PAPER: dict[tuple[int, int, int], tuple[tuple[Any, Any, Any], tuple[int, int, int] | None]] = {
    (21, 30, 52): ((3, (5, 13), (7, 5, 13)), (2, 6, 18)),
    (21, 45, 80): ((3, (9, 10), (7, 15, 20)), (2, 10, 9)),
    (24, 36, 64): ((3, (6, 8), (8, 12, 8)), None),
    (36, 30, 52): ((3, (5, 13), (12, 10, 13)), None),
}
_ANY_GRID = (ApproxBlocks(8), ApproxBlocks(48), ApproxBlocks(72))


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer does at one step.

    Attributes:
        kind: ``"temporal"``, ``"spatial"`` or ``"spatiotemporal"``.
        rule: the kind's rule.
        dense: whether the layer attends everything instead.
    """

    kind: str
    rule: Rule
    dense: bool


@dataclasses.dataclass(frozen=True)
class VMoBAConfig:
    """VMoBA for all layers of a model (arXiv 2506.23858, Sec. 3).

    Attributes:
        temporal: 1D blocks: frames in each, or ``ApproxBlocks``.
        spatial: 2D blocks: ``(bh, bw)`` in tokens, through all frames, or ``ApproxBlocks``.
        spatiotemporal: 3D blocks: ``(bt, bh, bw)`` in tokens, or ``ApproxBlocks``.
        rule: one ``TopK`` or ``Threshold``, or a mapping from kind to rule that has every kind of ``cycle``. Kept as an
            immutable copy.
        cycle: kinds in the order of the layers: layer i has kind ``cycle[i % len(cycle)]``.
        dense_layers: the first so many layers attend everything.
        dense_steps: the first so many denoising steps attend everything: a number of steps (int), or a share of them
            below 1 (float).
        dispatch: as in ``vmoba_attention``, for the layers and steps that are not dense.
        backend: likewise.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if a value is out of range.

    Example:
        >>> config = VMoBAConfig(3, (5, 13), ApproxBlocks(72), Threshold(0.25, max_density=0.25), dense_layers=1)
        >>> config.layer(0, num_layers=30).dense, config.layer(1, num_layers=30).kind
        (True, 'spatial')
        >>> config.partition("spatiotemporal", (21, 30, 52)).block
        (7, 5, 13)
    """

    temporal: int | ApproxBlocks
    spatial: tuple[int, int] | ApproxBlocks
    spatiotemporal: tuple[int, int, int] | ApproxBlocks
    rule: Rule | Mapping[str, Rule]
    cycle: tuple[str, ...] = dataclasses.field(default=KINDS, kw_only=True)
    dense_layers: int = dataclasses.field(default=0, kw_only=True)
    dense_steps: int | float = dataclasses.field(default=0, kw_only=True)
    dispatch: str = dataclasses.field(default="auto", kw_only=True)
    backend: str = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.temporal, ApproxBlocks):
            check_positive("temporal", self.temporal)
        # Lists are welcome (JSON has them), but a frozen object must be hashable.
        object.__setattr__(self, "spatial", _sizes("spatial", self.spatial, 2))
        object.__setattr__(self, "spatiotemporal", _sizes("spatiotemporal", self.spatiotemporal, 3))
        object.__setattr__(self, "cycle", _cycle(self.cycle))
        object.__setattr__(self, "rule", _rules(self.rule, self.cycle))
        check_count("dense_layers", self.dense_layers)
        _check_steps(self.dense_steps)
        check_choice("dispatch", self.dispatch, DISPATCHES)
        check_choice("backend", self.backend, BACKENDS)

    @classmethod
    def paper(cls, setting: str, grid: tuple[int, int, int] | None = None) -> Self:
        """The paper's settings (arXiv 2506.23858, Sec. 4).

        Args:
            setting: ``"training"``: ``Threshold(0.25, pool="head")``, here with ``max_density=0.25``, which its
                densities of about 0.19 stay below and which makes calls free of host reads. ``"inference"``, without
                training: a quarter of the blocks for each query (``TopK``, pool ``"query"``), the first quarter of
                the steps dense.
            grid: latent video size (frames, height, width) in tokens. At ``(21, 30, 52)``, ``(21, 45, 80)``,
                ``(24, 36, 64)`` and ``(36, 30, 52)`` the paper's block shapes, and its k where it has one. At any
                other, and by default, about 8, 48 and 72 blocks, as the paper has them at ``(24, 36, 64)``.

        Raises:
            TypeError: if ``grid`` has a wrong type.
            ValueError: if ``setting`` is unknown, or ``grid`` is not three sizes of at least 1.
        """
        check_choice("setting", setting, SETTINGS)
        blocks, k = _ANY_GRID, None
        if grid is not None:
            blocks, k = _PAPER.get(BlockPartition(grid, (1, 1, 1)).grid, (blocks, k))
        if setting == "training":
            return cls(*blocks, Threshold(0.25, pool="head", max_density=0.25))
        rule: Any = TopK(density=0.25) if k is None else dict(zip(KINDS, map(TopK, k), strict=True))
        return cls(*blocks, rule, dense_steps=0.25)

    def layer(self, i: int, num_layers: int, step: int | None = None, num_steps: int | None = None) -> Layer:
        """What layer i does; the one place that decides.

        Args:
            i: the layer, in 0..num_layers - 1.
            num_layers: layers of the model.
            step: the denoising step, from 0. Needed where ``dense_steps`` is not 0.
            num_steps: denoising steps in all. Needed where ``dense_steps`` is a share; the first
                ``ceil(dense_steps * num_steps)`` are dense then.

        Raises:
            TypeError: if an argument is not an int.
            ValueError: if an argument is out of range, or one that is needed is None.
        """
        check_positive("num_layers", num_layers)
        check_count("i", i, num_layers, "num_layers")
        if self.dense_layers > num_layers:
            raise ValueError(f"dense_layers must be at most num_layers = {num_layers}, got {self.dense_layers}")
        kind = self.cycle[i % len(self.cycle)]
        rule = self.rule[kind] if isinstance(self.rule, Mapping) else self.rule
        return Layer(kind, rule, self._is_dense_step(step, num_steps) or i < self.dense_layers)

    def partition(self, kind: str, grid: tuple[int, int, int], prefix: int = 0, suffix: int = 0) -> BlockPartition:
        """A kind's blocks on a grid.

        Args:
            kind: ``"temporal"``, ``"spatial"`` or ``"spatiotemporal"``.
            grid: latent video size (frames, height, width) in tokens.
            prefix: tokens before the video's.
            suffix: tokens behind the video's.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if ``kind`` is unknown, a size is out of range, or the block is larger than the grid.
        """
        check_choice("kind", kind, KINDS)
        single = BlockPartition(grid, (1, 1, 1), prefix=prefix, suffix=suffix)
        sides = getattr(self, kind)
        if isinstance(sides, ApproxBlocks):
            block = approx_block(sides.count, single.grid, _AXES[kind])
        else:
            (bt, bh, bw), sides = single.grid, (sides,) if kind == "temporal" else sides
            block = {"temporal": (*sides, bh, bw), "spatial": (bt, *sides), "spatiotemporal": sides}[kind]
        if any(side > size for side, size in zip(block, single.grid, strict=True)):
            raise ValueError(f"{kind} block must not be larger than grid {single.grid}, got {block}")
        return dataclasses.replace(single, block=block)

    def to_json(self) -> str:
        """The config as JSON text, one field a line; ``from_json`` gives an equal one back."""
        return config_json.dump(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config of a text that ``to_json`` made, or of FastVideo's VMoBA JSON.

        FastVideo's is known by its keys. ``first_full_layer`` and ``first_full_step``, on which FastVideo does not act,
        become ``dense_layers`` and ``dense_steps``; as there, the cycle starts behind the dense layers. Missing keys
        take FastVideo's defaults. With ``moba_select_mode`` ``"threshold"`` the keys ``temporal_topk``,
        ``spatial_topk`` and ``st_topk`` mean nothing, and with ``"topk"`` ``moba_threshold``: they are checked, and
        not kept. A k counts the own block in both; one above the number of blocks, which FastVideo lowers, is an error
        once the grid arrives.

        Raises:
            TypeError: if ``text`` is not a str, or a value has a wrong type.
            ValueError: if ``text`` is not JSON of one of the two, or has an unknown key or value.
        """
        return cls(**config_json.load(text))

    def _is_dense_step(self, step: int | None, num_steps: int | None) -> bool:
        if num_steps is not None:
            check_positive("num_steps", num_steps)
        if step is not None:
            check_count("step", step, num_steps, "num_steps")
        if not self.dense_steps:
            return False
        if step is None:
            raise ValueError(f"step must be given where dense_steps is not 0 but {self.dense_steps}, got None")
        if isinstance(self.dense_steps, int):
            return step < self.dense_steps
        if num_steps is None:
            raise ValueError(f"num_steps must be given where dense_steps is a share, {self.dense_steps}, got None")
        # Not step < share * steps: that product may be rounded up past a whole number, and a step too many be dense.
        return step / num_steps < self.dense_steps


class _RulePerKind(Mapping[str, Rule]):
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


def _sizes(name: str, value: Any, length: int) -> Any:
    if isinstance(value, ApproxBlocks):
        return value
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of {length} ints or ApproxBlocks, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} sizes, got {value!r}")
    for size in value:
        check_positive(name, size)
    return tuple(value)


def _cycle(value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"cycle must be a tuple of kinds, got {value!r}")
    if not value or any(kind not in KINDS for kind in value):
        raise ValueError(f"cycle must hold at least one kind, of {KINDS} each, got {value!r}")
    return tuple(value)


def _rules(value: Any, cycle: tuple[str, ...]) -> Rule | Mapping[str, Rule]:
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
        raise ValueError(f"rule must have every kind of cycle {cycle}, got none for {missing[0]!r}")
    return _RulePerKind(value)


def _check_steps(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"dense_steps must be an int or a float, got {value!r}")
    if value < 0 or (isinstance(value, float) and not value < 1):
        raise ValueError(f"dense_steps must be a number of steps (int) or a share in [0, 1) (float), got {value!r}")
