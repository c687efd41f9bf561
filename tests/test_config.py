"""VMoBAConfig: which layer does what, blocks on any grid."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import configs
from vmoba_flex import BySteps, Remember, Tail, Threshold, TopK, presets
from vmoba_flex.approx_blocks import _even_sides
from vmoba_flex.config import KINDS, ApproxBlocks, Layer, VMoBAConfig
from vmoba_flex.models.table import ADAPTERS
from vmoba_flex.remember import steps_served

RULE = Threshold(0.25)
SMALL = VMoBAConfig(2, (2, 3), (1, 2, 3), RULE)
ABOUT = VMoBAConfig(ApproxBlocks(8), ApproxBlocks(48), ApproxBlocks(72), RULE)
PER_KIND = {"temporal": TopK(1), "spatial": Threshold(0.5), "spatiotemporal": TopK(density=0.5)}
PAPER = [
    ((21, 30, 52), (3, (5, 13), (7, 5, 13)), (7, 24, 72), (2, 6, 18)),
    ((21, 45, 80), (3, (9, 10), (7, 15, 20)), (7, 40, 36), (2, 10, 9)),
    ((24, 36, 64), (3, (6, 8), (8, 12, 8)), (8, 48, 72), None),
    ((36, 30, 52), (3, (5, 13), (12, 10, 13)), (12, 24, 36), None),
]

sizes = st.integers(1, 60)


def config(**changes: object) -> VMoBAConfig:
    return dataclasses.replace(SMALL, **changes)


# Layers


@given(configs(), st.integers(0, 11))
def test_layers_cycle_through_the_kinds(config: VMoBAConfig, i: int):
    layer = config.layer(i, 12, step=1, num_steps=4)
    assert layer.kind == config.cycle[i % len(config.cycle)]
    rules: Any = config.rule
    rule = rules[layer.kind] if isinstance(rules, Mapping) else rules[i] if isinstance(rules, tuple) else rules
    assert layer.rule == (rule.at(1, 4) if isinstance(rule, BySteps) else rule)
    assert layer.tail == (config.tail.at(1, 4) if isinstance(config.tail, BySteps) else config.tail)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"dense_layers": 2}, [0, 1]),
        ({"dense_layers": 4}, [0, 1, 2, 3]),
        ({"dense_layers": [0, 2]}, [0, 2]),
        ({"dense_layers": (-1,)}, [3]),
        ({"dense_layers": [0, -4, -2]}, [0, 2]),
        ({"dense_layers": range(1, 3)}, [1, 2]),
        ({"dense_layers": []}, []),
    ],
)
def test_layers_that_are_dense(changes: dict[str, Any], dense: list[int]):
    assert [i for i in range(4) if config(**changes).layer(i, 4).dense] == dense
    assert [i for i in range(4) if config(**changes).layer(i, 4, step=0, num_steps=1).dense] == dense


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "dense"),
    [(0, 4, 0), (1, 4, 1), (3, 4, 3), (9, 4, 4), (0.25, 4, 1), (0.25, 50, 13), (0.25, 1, 1), (0.99, 4, 4), (0.0, 4, 0)],
)
def test_first_steps_are_dense(dense_steps: float, num_steps: int, dense: int):
    for i in range(3):
        layers = [config(dense_steps=dense_steps).layer(i, 3, step, num_steps) for step in range(num_steps)]
        assert [layer.dense for layer in layers] == [step < dense for step in range(num_steps)]


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "dense"),
    [
        ((1, 2), 6, [0, 4, 5]),
        ([2, 1], 4, [0, 1, 3]),
        ((0.25, 0.25), 8, [0, 1, 6, 7]),
        ((0.3, 0.3), 4, [0, 1, 2, 3]),  # of each share so many that it is reached
        ((0, 0.5), 5, [2, 3, 4]),
        ((0.5, 1), 6, [0, 1, 2, 5]),
        ((3, 3), 4, [0, 1, 2, 3]),
        ((1, 0), 3, [0]),
        ((0.0, 0), 3, []),
    ],
)
def test_first_and_last_steps_are_dense(dense_steps: Any, num_steps: int, dense: list[int]):
    ours = config(dense_steps=dense_steps)
    assert [step for step in range(num_steps) if ours.layer(0, 3, step, num_steps).dense] == dense


@given(st.integers(1, 60), st.integers(0, 59), st.data())
def test_last_steps_mirror_the_first(num_steps: int, step: int, data: st.DataObject):
    part = data.draw(st.integers(0, 70) | st.floats(0, 1, exclude_max=True))
    first, last = config(dense_steps=(part, 0)), config(dense_steps=(0, part))
    step %= num_steps
    assert last.layer(0, 1, step, num_steps) == first.layer(0, 1, num_steps - 1 - step, num_steps)
    assert first == config(dense_steps=part)


@given(st.integers(1, 200), st.data())
@example(100, None)
def test_a_share_of_whole_steps_is_that_many_steps(num_steps: int, data: st.DataObject | None):
    # 0.07 * 100 is 7.000000000000001 in floats.
    dense = 7 if data is None else data.draw(st.integers(0, num_steps - 1))
    shared = config(dense_steps=dense / num_steps)
    assert sum(shared.layer(0, 1, step, num_steps).dense for step in range(num_steps)) == dense


def test_a_number_of_steps_needs_no_total():
    assert config(dense_steps=2).layer(0, 3, step=1).dense
    assert not config(dense_steps=2).layer(0, 3, step=2).dense


def test_dense_layers_keep_their_place_in_the_cycle():
    assert [config(dense_layers=1).layer(i, 6).kind for i in range(6)] == [*KINDS, *KINDS]
    assert config(dense_layers=1, rule=PER_KIND).layer(0, 6) == Layer("temporal", TopK(1), dense=True)


def test_rules_and_tails_change_by_steps():
    falling = {0: TopK(density=0.5), 0.25: TopK(density=0.25), 0.75: TopK(1)}
    ours = config(rule=BySteps(falling), tail=BySteps({0: None, 2: Tail(8)}), dense_steps=1)
    layers = [ours.layer(4, 6, step, 8) for step in range(8)]
    assert [layer.rule for layer in layers] == [falling[start] for start in (0, 0, 0.25, 0.25, 0.25, 0.25, 0.75, 0.75)]
    assert [layer.tail for layer in layers] == [None, None, *[Tail(8)] * 6]
    assert [layer.dense for layer in layers] == [True, *[False] * 7]
    assert ours.needs_step and not config(tail=Tail(8)).needs_step
    per_kind = config(rule=PER_KIND | {"spatial": BySteps({0: RULE, 1: TopK(1)})})
    assert [per_kind.layer(i, 3, step=1).rule for i in range(3)] == [TopK(1), TopK(1), TopK(density=0.5)]


def test_a_rule_for_each_layer():
    ours = config(rule=[TopK(1), RULE, BySteps({0: TopK(2), 3: TopK(1)})])
    assert [ours.layer(i, 3, step=2).rule for i in range(3)] == [TopK(1), RULE, TopK(2)]
    assert hash(ours) == hash(config(rule=ours.rule))


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, (3, 3), ValueError, r"i must lie in 0..num_layers - 1 = 0..2, got 3"),
        ({}, (-1, 3), ValueError, r"i must lie in 0..num_layers - 1 = 0..2, got -1"),
        ({}, (0.0, 3), TypeError, "i must be an int, got 0.0"),
        ({}, (0, 0), ValueError, "num_layers must be at least 1, got 0"),
        ({}, (0, True), TypeError, "num_layers must be an int, got True"),
        ({"dense_layers": 4}, (0, 3), ValueError, "dense_layers must be at most num_layers = 3, got 4"),
        ({}, (0, 3, 4, 4), ValueError, "step must lie in 0..num_steps - 1 = 0..3, got 4"),
        ({}, (0, 3, -1, 4), ValueError, "step must lie in 0..num_steps - 1 = 0..3, got -1"),
        ({}, (0, 3, -1), ValueError, "step must be at least 0, got -1"),
        ({}, (0, 3, 0.5), TypeError, "step must be an int, got 0.5"),
        ({}, (0, 3, 0, 0), ValueError, "num_steps must be at least 1, got 0"),
        ({}, (0, 3, None, 1.5), TypeError, "num_steps must be an int, got 1.5"),
        ({"dense_steps": 2}, (0, 3), ValueError, "step must be given where dense_steps is not 0 but 2, got None"),
        ({"dense_steps": 0.5}, (0, 3, None, 4), ValueError, "step must be given where .* 0.5, got None"),
        ({"dense_steps": 0.5}, (0, 3, 1), ValueError, "num_steps must be given where .* a share, 0.5, got None"),
        ({"dense_steps": (1, 1)}, (0, 3, 1), ValueError, r"num_steps must be .* has last steps, \(1, 1\), got None"),
        ({"dense_steps": (0, 1)}, (0, 3), ValueError, r"step must be given where .* \(0, 1\), got None"),
        (
            {"rule": BySteps({0: RULE, 1: TopK(1)})},
            (0, 3),
            ValueError,
            r"step must be given where .* BySteps\({0: Threshold\(.*, 1: TopK\(.*, got None",
        ),
        (
            {"tail": BySteps({0: None, 0.5: Tail()})},
            (0, 3, 1),
            ValueError,
            r"num_steps must be given where .* share of them, BySteps\({0: None, 0.5: Tail\(cell=64\)}\), got None",
        ),
        (
            {"rule": [RULE, RULE]},
            (0, 3),
            ValueError,
            "rule must have one entry for each layer, num_layers = 3, got 2",
        ),
        (
            {"remember": Remember(2)},
            (0, 3, 1),
            ValueError,
            "step and num_steps must be given where remember is, got 1 and None",
        ),
        ({"dense_layers": [0, 3]}, (0, 3), ValueError, r"dense_layers must lie in .* = -3..2, got 3 in \(0, 3\)"),
        ({"dense_layers": [-4]}, (0, 3), ValueError, r"dense_layers must lie in .* = -3..2, got -4 in \(-4,\)"),
    ],
)
def test_bad_layers(changes: dict[str, object], arguments: tuple[object, ...], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        config(**changes).layer(*arguments)


# Blocks


@given(st.tuples(sizes, sizes, sizes), st.integers(0, 3), st.integers(0, 3))
def test_explicit_blocks_are_what_they_say(grid: tuple[int, int, int], prefix: int, suffix: int):
    bt, bh, bw = (max(1, size // 2) for size in grid)
    blocks = VMoBAConfig(bt, (bh, bw), (bt, bh, bw), RULE)
    expected = {
        "temporal": (bt, *grid[1:]),
        "spatial": (grid[0], bh, bw),
        "spatiotemporal": (bt, bh, bw),
    }
    for kind in KINDS:
        partition = blocks.partition(kind, grid, prefix, suffix)
        assert (partition.grid, partition.block, partition.prefix, partition.suffix) == (
            grid, expected[kind], prefix, suffix
        )  # fmt: skip


@given(st.tuples(sizes, sizes, sizes), st.integers(1, 120), st.sampled_from(KINDS))
@example((7, 31, 53), 1, "temporal")
@example((1, 1, 1), 120, "spatiotemporal")
def test_approx_blocks_come_near_to_the_count(grid: tuple[int, int, int], count: int, kind: str):
    about = VMoBAConfig(ApproxBlocks(count), ApproxBlocks(count), ApproxBlocks(count), RULE)
    partition = about.partition(kind, grid)
    axes = {"temporal": (0,), "spatial": (1, 2), "spatiotemporal": (0, 1, 2)}[kind]
    assert all(partition.block[axis] == grid[axis] for axis in range(3) if axis not in axes)
    # The nearest that even cuts reach, found from the cells instead of the sides.
    counts = {1}
    for axis in axes:
        cells = {-(-grid[axis] // side) for side in range(1, grid[axis] + 1)}
        counts = {number * cell for number in counts for cell in cells}
    nearest = min(abs(number - count) for number in counts)
    assert abs(partition.num_blocks - count) <= max(nearest, count / 10)
    assert about.partition(kind, grid) == partition


@given(st.tuples(st.integers(8, 40), st.integers(24, 60), st.integers(24, 60)), st.integers(16, 60))
@example((23, 23, 46), 23)  # divided by 23 x 23 x 2 only
def test_approx_blocks_are_not_slivers(grid: tuple[int, int, int], count: int):
    about = VMoBAConfig(1, ApproxBlocks(count), ApproxBlocks(count), RULE)
    _, *window = about.partition("spatial", grid).block
    cube = about.partition("spatiotemporal", grid).block
    assert max(window) <= 10 * min(window)
    assert max(cube) <= 10 * min(cube)
    for kind in KINDS[1:]:
        assert abs(math.log(about.partition(kind, grid).num_blocks / count)) < math.log(1.2)


@pytest.mark.parametrize("size", [*range(1, 130), 720, 1000, 1023, 1024])
def test_sides_are_those_of_all_numbers_of_cells(size: int):
    assert _even_sides(size) == sorted({-(-size // cells) for cells in range(1, size + 1)})


@pytest.mark.parametrize("grid", [(2**31 - 1, 1, 1), (1, 46_340, 46_340), (1290, 1290, 1290)])
def test_approx_blocks_of_the_largest_grids(grid: tuple[int, int, int]):
    for kind in KINDS:
        assert ABOUT.partition(kind, grid).num_blocks <= 80


def test_approx_blocks_divide_the_grid_where_a_shape_near_the_count_does():
    about = VMoBAConfig(ApproxBlocks(12), ApproxBlocks(25), ApproxBlocks(74), RULE)
    assert about.partition("temporal", (21, 8, 8)).block == (2, 8, 8)  # 11 blocks are nearest, though 7 would divide
    assert about.partition("temporal", (40, 8, 8)).block == (4, 8, 8)  # 10 divide, and 14 would be as near
    assert about.partition("spatial", (21, 30, 52)).block == (21, 5, 13)
    assert about.partition("spatiotemporal", (21, 30, 52)).block == (7, 5, 13)
    assert about.partition("spatial", (3, 4, 4)).num_blocks == 16


@pytest.mark.parametrize(("grid", "blocks", "counts", "k"), PAPER)
def test_paper_settings(grid: tuple[int, int, int], blocks: object, counts: tuple[int, ...], k: tuple[int, ...] | None):
    training, inference = VMoBAConfig.paper("training", grid), VMoBAConfig.paper("inference", list(grid))
    for setting in (training, inference):
        assert (setting.temporal, setting.spatial, setting.spatiotemporal) == blocks
        assert tuple(setting.partition(kind, grid).num_blocks for kind in KINDS) == counts
        assert (setting.cycle, setting.dense_layers) == (KINDS, 0)
    assert training.rule == Threshold(0.25, pool="head", max_density=0.25)
    assert (training.dense_steps, inference.dense_steps) == (0, 0.25)
    expected = TopK(density=0.25) if k is None else dict(zip(KINDS, map(TopK, k), strict=True))
    assert inference.rule == expected
    # ApproxBlocks with the paper's counts comes to the paper's shapes.
    about = dataclasses.replace(training, **dict(zip(KINDS, map(ApproxBlocks, counts), strict=True)))
    assert [about.partition(kind, grid) for kind in KINDS] == [training.partition(kind, grid) for kind in KINDS]


@pytest.mark.parametrize("model", presets.NAMES)
def test_presets_are_what_they_say(model: str):
    for speed, mean in (("faithful", 0.25), ("balanced", 0.125), ("fast", 0.083)):
        config = VMoBAConfig.preset(model, speed, (21, 30, 52))
        layers = [config.layer(0, 30, step, 48) for step in range(48)]
        assert [layer.dense for layer in layers] == [True] * 12 + [False] * 36
        densities = [layer.rule.density for layer in layers[12:] if isinstance(layer.rule, TopK)]
        assert sum(densities) / 36 == pytest.approx(mean, abs=1e-3)
        assert {layer.tail for layer in layers} == {Tail()}
        assert config.cycle == (("spatial",) if "2DModel" in model else KINDS)
        # An expert that begins sparse chooses once, and never again.
        refresh = config.remember and config.remember.refresh
        assert (refresh is not None and refresh > 48) == (model == "wan2.2-a14b")
        assert VMoBAConfig.from_json(config.to_json()) == config
    assert VMoBAConfig.preset("wan2.1-14b", "fast") == VMoBAConfig.fast()


def test_presets_know_each_class_of_diffusers_that_takes_vmoba():
    assert {name for name in presets.NAMES if "Transformer" in name} == set(ADAPTERS)


@pytest.mark.parametrize("grid", [None, (21, 45, 80)])
def test_fast_remembers_what_a_dense_quarter_finds(grid: tuple[int, int, int] | None):
    fast, paper = VMoBAConfig.fast(grid), VMoBAConfig.paper("inference", grid)
    assert [getattr(fast, kind) for kind in KINDS] == [getattr(paper, kind) for kind in KINDS]
    layers = [fast.layer(0, 30, step, 40) for step in range(40)]
    assert [(layer.dense, layer.recalls) for layer in layers] == [(True, False)] * 10 + [(False, True)] * 30
    assert [len(layer.records) for layer in layers] == [0] * 9 + [2] + [0] * 30
    assert {layer.rule for layer in layers[10:]} == set(layers[9].records)
    assert VMoBAConfig.from_json(fast.to_json()) == fast


@pytest.mark.parametrize(
    ("dense_steps", "refresh", "expected"),
    [
        (2, None, {1: range(2, 6)}),
        (2, 2, {1: range(2, 4), 4: range(4, 6)}),
        (0, 3, {0: range(3), 3: range(3, 6)}),
        ((1, 2), 1, {0: range(1, 2), 2: range(2, 3), 3: range(3, 4)}),
        ((0.5, 1), None, {2: range(3, 5)}),
        (6, None, {}),
        (9, 2, {}),
    ],
)
def test_which_steps_choose_for_which(dense_steps: Any, refresh: int | None, expected: dict[int, range]):
    served = {step: steps_served(refresh, dense_steps, step, 6) for step in range(6)}
    assert {step: steps for step, steps in served.items() if steps} == expected


@pytest.mark.parametrize("grid", [None, (13, 30, 52), [13, 30, 52]])
def test_paper_settings_at_other_grids(grid: tuple[int, int, int] | None):
    about = VMoBAConfig(ApproxBlocks(8), ApproxBlocks(48), ApproxBlocks(72), Threshold(0.25, max_density=0.25))
    assert VMoBAConfig.paper("training", grid) == about
    top_k = dataclasses.replace(about, rule=TopK(density=0.25), dense_steps=0.25)
    assert VMoBAConfig.paper("inference", grid) == top_k


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SMALL.partition("1d", (2, 4, 4)), ValueError, "kind must be one of .*, got '1d'"),
        (lambda: SMALL.partition("spatial", (2, 4)), ValueError, r"grid must have 3 sizes, got \(2, 4\)"),
        (lambda: SMALL.partition("spatial", 2), TypeError, "grid must be a tuple of 3 ints, got 2"),
        (lambda: SMALL.partition("spatial", (2, 4, 4), -1), ValueError, "prefix must be at least 0, got -1"),
        (lambda: SMALL.partition("spatial", (2, 4, 4), 0, 1.5), TypeError, "suffix must be an int, got 1.5"),
        (
            lambda: SMALL.partition("temporal", (1, 4, 4)),
            ValueError,
            r"temporal block must not be larger than grid \(1, 4, 4\), got \(2, 4, 4\)",
        ),
        (
            lambda: SMALL.partition("spatial", (2, 4, 2)),
            ValueError,
            r"spatial block must not be larger than grid \(2, 4, 2\), got \(2, 2, 3\)",
        ),
        (
            lambda: SMALL.partition("spatiotemporal", (1, 1, 4)),
            ValueError,
            r"spatiotemporal block must not be larger than grid \(1, 1, 4\), got \(1, 2, 3\)",
        ),
        (lambda: VMoBAConfig.paper("test"), ValueError, "setting must be one of .*'inference'.*, got 'test'"),
        (lambda: VMoBAConfig.paper("training", (1, 2)), ValueError, r"grid must have 3 sizes, got \(1, 2\)"),
        (lambda: VMoBAConfig.fast((1, 2)), ValueError, r"grid must have 3 sizes, got \(1, 2\)"),
        (lambda: VMoBAConfig.preset("wan", "fast"), ValueError, r"model must be one of \('wan2.1-1.3b', .*, got 'wan'"),
        (lambda: VMoBAConfig.preset("mochi", "slow"), ValueError, r"speed must be one of \('faithful', .*, got 'slow'"),
        (lambda: VMoBAConfig.preset("mochi", "fast", (1, 2)), ValueError, r"grid must have 3 sizes, got \(1, 2\)"),
        (lambda: Remember(0), ValueError, "refresh must be at least 1, got 0"),
        (lambda: Remember(on="disk"), ValueError, "on must be one of .*, got 'disk'"),
        (lambda: Remember(max_bytes=0.5), TypeError, "max_bytes must be an int, got 0.5"),
        (lambda: ApproxBlocks(0), ValueError, "count must be at least 1, got 0"),
        (lambda: ApproxBlocks(2.5), TypeError, "count must be an int, got 2.5"),
        (lambda: ApproxBlocks(10**400), ValueError, "count must be below 2..31, got 10000"),
        (
            lambda: ABOUT.partition("temporal", (2**16, 2**15, 1)),
            ValueError,
            r"grid must have fewer than 2..31 tokens, got \(65536, 32768, 1\)",
        ),
    ],
)  # fmt: skip
def test_bad_partitions(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Values


@given(configs())
def test_is_a_value(config: VMoBAConfig):
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert same == config
        assert hash(same) == hash(config)
        assert repr(same) == repr(config)


def test_rules_are_a_copy_that_cannot_change():
    rules = dict(reversed(PER_KIND.items()))
    ours = config(rule=rules)
    assert ours.rule == PER_KIND
    assert ours == config(rule=PER_KIND)
    assert hash(ours) == hash(config(rule=PER_KIND))
    assert ours != config()
    rules["temporal"] = TopK(2)
    assert ours.layer(0, 3).rule == TopK(1)
    with pytest.raises(TypeError):
        ours.rule["temporal"] = TopK(2)  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.rule = RULE  # type: ignore[misc]


def test_takes_lists_and_rules_for_kinds_outside_the_cycle():
    ours = VMoBAConfig(2, [2, 3], [1, 2, 3], PER_KIND, cycle=["spatial"])
    assert (ours.spatial, ours.spatiotemporal, ours.cycle) == ((2, 3), (1, 2, 3), ("spatial",))
    assert ours.layer(5, 6) == Layer("spatial", Threshold(0.5), dense=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temporal": 0}, ValueError, "temporal must be at least 1, got 0"),
        ({"temporal": (2,)}, TypeError, r"temporal must be an int, got \(2,\)"),
        ({"spatial": 2}, TypeError, "spatial must be a tuple of 2 ints or ApproxBlocks, got 2"),
        ({"spatial": (2, 3, 4)}, ValueError, r"spatial must have 2 sizes, got \(2, 3, 4\)"),
        ({"spatial": (2, 0)}, ValueError, "spatial must be at least 1, got 0"),
        ({"spatiotemporal": (2, 2.0, 2)}, TypeError, "spatiotemporal must be an int, got 2.0"),
        ({"spatiotemporal": (2, 2)}, ValueError, r"spatiotemporal must have 3 sizes, got \(2, 2\)"),
        ({"rule": 0.25}, TypeError, "rule must be a TopK, a Threshold, BySteps of these, .*, got 0.25"),
        ({"rule": BySteps({0: RULE, 2: 2})}, TypeError, "rule must hold TopKs and Thresholds, got 2$"),
        ({"rule": [RULE, None]}, TypeError, "rule must hold TopKs and Thresholds, got None for layer 1"),
        ({"rule": []}, ValueError, r"rule must have one entry for each layer, got \[\]"),
        ({"remember": True}, TypeError, "remember must be a Remember or None, got True"),
        ({"remember": Remember()}, ValueError, r"remember must come with dense first steps, .*, or with Remember\("),
        ({"remember": Remember(), "dense_steps": (0, 2)}, ValueError, r"remember must come .* dense_steps=\(0, 2\)"),
        ({"remember": Remember(1), "dispatch": "dense"}, ValueError, "remember must be None for dispatch='dense'"),
        ({"tail": 64}, TypeError, "tail must be a Tail or None, or BySteps of these, got 64"),
        ({"tail": BySteps({0: None, 1: 64})}, TypeError, "tail must be a Tail or None, .*, got BySteps"),
        (
            {"tail": BySteps({0: None, 1: Tail()}), "dispatch": "dense"},
            ValueError,
            "tail must be None for dispatch='dense', which skips no block, got BySteps",
        ),
        ({"rule": PER_KIND | {"1d": RULE}}, ValueError, "rule must have keys of .*, got '1d'"),
        ({"rule": PER_KIND | {"spatial": 2}}, TypeError, "rule must hold TopKs and Thresholds, got 2 for 'spatial'"),
        ({"rule": {"temporal": RULE}}, ValueError, "rule must have every kind of cycle .*, got none for 'spatial'"),
        ({"cycle": ()}, ValueError, r"cycle must hold at least one kind, of .* each, got \(\)"),
        ({"cycle": ("spatial", "2d")}, ValueError, r"cycle must hold .*, got \('spatial', '2d'\)"),
        ({"cycle": "spatial"}, TypeError, "cycle must be a tuple of kinds, got 'spatial'"),
        ({"dense_layers": -1}, ValueError, "dense_layers must be at least 0, got -1"),
        ({"dense_layers": 0.5}, TypeError, "dense_layers must be an int, or a list of layers .*, got 0.5"),
        ({"dense_steps": -1}, ValueError, r"dense_steps must be .* a share in \[0, 1\) \(float\), got -1"),
        ({"dense_steps": 1.0}, ValueError, r"dense_steps must be a number of steps \(int\) or .*, got 1.0"),
        ({"dense_steps": math.nan}, ValueError, "dense_steps must be .*, got nan"),
        ({"dense_layers": [0, 1.0]}, TypeError, r"dense_layers must hold ints, got \[0, 1.0\]"),
        ({"dense_layers": [True]}, TypeError, r"dense_layers must hold ints, got \[True\]"),
        ({"dense_layers": "01"}, TypeError, "dense_layers must be an int, or a list of layers .*, got '01'"),
        ({"dense_layers": {0, 1}}, TypeError, "dense_layers must be an int, or a list of layers .*, got {0, 1}"),
        ({"dense_layers": None}, TypeError, "dense_layers must be an int, or a list of layers .*, got None"),
        ({"dense_steps": (1,)}, ValueError, r"dense_steps must be one number or a pair \(first, last\), got \(1,\)"),
        ({"dense_steps": (1, -1)}, ValueError, r"dense_steps must be a number of steps .*, got \(1, -1\)"),
        ({"dense_steps": (1.5, 1)}, ValueError, r"dense_steps must be a number of steps .*, got \(1.5, 1\)"),
        ({"dense_steps": (0.5, 0.5)}, ValueError, r"dense_steps must be shares .* less than 1, got \(0.5, 0.5\)"),
        ({"dense_steps": (0, "1")}, TypeError, r"dense_steps must be an int or a float, .*, got \(0, '1'\)"),
        ({"dense_steps": (False, 1)}, TypeError, r"dense_steps must be an int or a float, .*, got \(False, 1\)"),
        ({"dense_steps": True}, TypeError, "dense_steps must be an int or a float, or a pair of these, got True"),
        ({"dispatch": "fast"}, ValueError, "dispatch must be one of .*, got 'fast'"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .*, got 'cudnn'"),
    ],
)
def test_bad_values(changes: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        config(**changes)
