"""VMoBAConfig: which layer does what, blocks on any grid, and its JSON."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import configs
from vmoba_flex import Threshold, TopK, config_json
from vmoba_flex.config import KINDS, ApproxBlocks, Layer, VMoBAConfig

RULE = Threshold(0.25)
SMALL = VMoBAConfig(2, (2, 3), (1, 2, 3), RULE)
PER_KIND = {"temporal": TopK(1), "spatial": Threshold(0.5), "spatiotemporal": TopK(density=0.5)}
PAPER = [
    ((21, 30, 52), (3, (5, 13), (7, 5, 13)), (7, 24, 72), (2, 6, 18)),
    ((21, 45, 80), (3, (9, 10), (7, 15, 20)), (7, 40, 36), (2, 10, 9)),
    ((24, 36, 64), (3, (6, 8), (8, 12, 8)), (8, 48, 72), None),
    ((36, 30, 52), (3, (5, 13), (12, 10, 13)), (12, 24, 36), None),
]
# The file that FastVideo ships for Wan 1.3B at 77x448x832.
FASTVIDEO = {
    "temporal_chunk_size": 2,
    "temporal_topk": 2,
    "spatial_chunk_size": [4, 13],
    "spatial_topk": 6,
    "st_chunk_size": [4, 4, 13],
    "st_topk": 18,
    "moba_select_mode": "threshold",
    "moba_threshold": 0.25,
    "moba_threshold_type": "query_head",
    "first_full_layer": 0,
    "first_full_step": 12,
    "temporal_layer": 1,
    "spatial_layer": 1,
    "st_layer": 1,
}

sizes = st.integers(1, 60)


def config(**changes: object) -> VMoBAConfig:
    return dataclasses.replace(SMALL, **changes)


def from_json(data: object) -> VMoBAConfig:
    return VMoBAConfig.from_json(json.dumps(data))


def from_fastvideo(**changes: object) -> VMoBAConfig:
    return from_json(FASTVIDEO | changes)


def own(**changes: object) -> dict[str, object]:
    return json.loads(SMALL.to_json()) | changes


# Layers


@given(configs(), st.integers(0, 11))
def test_layers_cycle_through_the_kinds(config: VMoBAConfig, i: int):
    layer = config.layer(i, 12, step=0, num_steps=4)
    assert layer.kind == config.cycle[i % len(config.cycle)]
    assert layer.rule == (config.rule if isinstance(config.rule, TopK | Threshold) else config.rule[layer.kind])


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"dense_layers": 2}, [0, 1]),
        ({"dense_layers": 4}, [0, 1, 2, 3]),
    ],
)
def test_first_layers_are_dense(changes: dict[str, int], dense: list[int]):
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
@example((23, 23, 46), 23)  # divided by 23 x 23 x 2 alone
def test_approx_blocks_are_not_slivers(grid: tuple[int, int, int], count: int):
    about = VMoBAConfig(1, ApproxBlocks(count), ApproxBlocks(count), RULE)
    _, *window = about.partition("spatial", grid).block
    cube = about.partition("spatiotemporal", grid).block
    assert max(window) <= 10 * min(window)
    assert max(cube) <= 10 * min(cube)
    for kind in KINDS[1:]:
        assert abs(math.log(about.partition(kind, grid).num_blocks / count)) < math.log(1.2)


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
        (lambda: ApproxBlocks(0), ValueError, "count must be at least 1, got 0"),
        (lambda: ApproxBlocks(2.5), TypeError, "count must be an int, got 2.5"),
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
        ({"rule": 0.25}, TypeError, "rule must be a TopK, a Threshold or a mapping from kind to these, got 0.25"),
        ({"rule": PER_KIND | {"1d": RULE}}, ValueError, "rule must have keys of .*, got '1d'"),
        ({"rule": PER_KIND | {"spatial": 2}}, TypeError, "rule must hold TopKs and Thresholds, got 2 for 'spatial'"),
        ({"rule": {"temporal": RULE}}, ValueError, "rule must have every kind of cycle .*, got none for 'spatial'"),
        ({"cycle": ()}, ValueError, r"cycle must hold at least one kind, of .* each, got \(\)"),
        ({"cycle": ("spatial", "2d")}, ValueError, r"cycle must hold .*, got \('spatial', '2d'\)"),
        ({"cycle": "spatial"}, TypeError, "cycle must be a tuple of kinds, got 'spatial'"),
        ({"dense_layers": -1}, ValueError, "dense_layers must be at least 0, got -1"),
        ({"dense_layers": 0.5}, TypeError, "dense_layers must be an int, got 0.5"),
        ({"dense_steps": -1}, ValueError, r"dense_steps must be .* a share in \[0, 1\) \(float\), got -1"),
        ({"dense_steps": 1.0}, ValueError, r"dense_steps must be a number of steps \(int\) or .*, got 1.0"),
        ({"dense_steps": math.nan}, ValueError, "dense_steps must be .*, got nan"),
        ({"dense_steps": True}, TypeError, "dense_steps must be an int or a float, got True"),
        ({"dispatch": "fast"}, ValueError, "dispatch must be one of .*, got 'fast'"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .*, got 'cudnn'"),
    ],
)
def test_bad_values(changes: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        config(**changes)


# JSON


@given(configs())
def test_json_round_trip(config: VMoBAConfig):
    text = config.to_json()
    assert VMoBAConfig.from_json(text) == config
    assert len(text.splitlines()) == len(dataclasses.fields(config)) + 3


def test_json_is_readable():
    text = VMoBAConfig(3, (5, 13), ApproxBlocks(72), {"spatial": TopK(6)}, cycle=["spatial"]).to_json()
    assert text.splitlines()[1:6] == [
        '  "version": 1,',
        '  "temporal": 3,',
        '  "spatial": [5, 13],',
        '  "spatiotemporal": {"approx_blocks": 72},',
        '  "rule": {"spatial": {"k": 6, "pool": "query"}},',
    ]


def test_json_has_every_field():
    assert [field.name for field in dataclasses.fields(VMoBAConfig)] == list(config_json.FIELDS)


def test_json_takes_defaults():
    short = {"version": 1, "temporal": 2, "spatial": [2, 3], "spatiotemporal": [1, 2, 3], "rule": {"tau": 0.25}}
    assert from_json(short) == SMALL


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1], ValueError, r"text must be a JSON object, got '\[1\]'"),
        ({}, ValueError, r"text must have 'version', or keys of FastVideo's VMoBA JSON, got keys \[\]"),
        ({"tau": 0.5}, ValueError, r"text must have 'version', or .*, got keys \['tau'\]"),
        (own(version=2), ValueError, "version must be 1, got 2"),
        (own(version="1"), ValueError, "version must be 1, got '1'"),
        (own(version=True), ValueError, "version must be 1, got True"),
        (own(tau=0.5), ValueError, "text must have keys of .*, got 'tau': 0.5"),
        (own(st_topk=2), ValueError, "text must have keys of .*, got 'st_topk': 2"),
        ({"version": 1, "temporal": 2}, ValueError, r"text must have 'spatial', got keys \['temporal', 'version'\]"),
        (own(temporal="2"), TypeError, "temporal must be an int, got '2'"),
        (own(spatial={"blocks": 2}), ValueError, r"spatial must have keys of \('approx_blocks',\), got 'blocks': 2"),
        (own(spatial={}), TypeError, "count must be an int, got None"),
        (own(rule=0.25), ValueError, "rule must be an object with 'tau', or with 'k' or 'density', got 0.25"),
        (own(rule={"tau": 1.5}), ValueError, r"tau must lie in \(0, 1\], got 1.5"),
        (own(rule={"k": 2.5}), TypeError, "k must be an int, got 2.5"),
        (own(rule={"tau": 0.5, "k": 2}), ValueError, "rule must have keys of .*, got 'k': 2"),
        (own(rule={"topk": 2}), ValueError, "rule must have keys of .*, got 'topk': 2"),
        (own(rule={"1d": {"k": 2}}), ValueError, "rule must have keys of .*, got '1d'"),
        (
            own(rule={"spatial": {"k": 2, "tau": 0.5}}),
            ValueError,
            "rule of 'spatial' must have keys of .*, got 'k': 2",
        ),
        (own(rule={"spatial": {"k": 2}, "tau": 1}), ValueError, "rule of 'tau' must be an object .*, got 1"),
    ],
)
def test_bad_json(data: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        from_json(data)


def test_text_that_is_no_json():
    with pytest.raises(ValueError, match="text must be JSON, got 'temporal = 3'"):
        VMoBAConfig.from_json("temporal = 3")
    with pytest.raises(ValueError, match=r"text must have each key once in an object, got keys .*'k', 'k'"):
        VMoBAConfig.from_json('{"k": 1, "k": 2}')
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        VMoBAConfig.from_json(b"{}")


# FastVideo's JSON


def test_fastvideo_json():
    assert from_json(FASTVIDEO) == VMoBAConfig(2, (4, 13), (4, 4, 13), Threshold(0.25, pool="query"), dense_steps=12)


def test_fastvideo_defaults():
    chunks = {key: value for key, value in FASTVIDEO.items() if key.endswith("chunk_size")}
    assert from_json(chunks) == from_json(FASTVIDEO)


@pytest.mark.parametrize(
    ("name", "pool"), [("query_head", "query"), ("block", "block"), ("head_global", "head"), ("overall", "global")]
)
def test_fastvideo_pools(name: str, pool: str):
    assert from_fastvideo(moba_threshold_type=name, moba_threshold=0.5).rule == Threshold(0.5, pool=pool)
    if name != "block":
        top_k = from_fastvideo(moba_threshold_type=name, moba_select_mode="topk")
        assert top_k.rule == {
            "temporal": TopK(2, pool=pool),
            "spatial": TopK(6, pool=pool),
            "spatiotemporal": TopK(18, pool=pool),
        }


@given(st.tuples(*[st.integers(0, 3)] * 3).filter(any), st.integers(0, 6))
def test_fastvideo_cycle_starts_behind_the_dense_layers(runs: tuple[int, int, int], dense: int):
    names = ("temporal_layer", "spatial_layer", "st_layer")
    ours = from_fastvideo(first_full_layer=dense, first_full_step=0, **dict(zip(names, runs, strict=True)))
    layers = [ours.layer(i, 20) for i in range(20)]
    assert [layer.dense for layer in layers] == [i < dense for i in range(20)]
    theirs = [kind for kind, run in zip(KINDS, runs, strict=True) for _ in range(run)]
    assert [layer.kind for layer in layers[dense:]] == [theirs[i % len(theirs)] for i in range(20 - dense)]


def test_fastvideo_first_full_step_is_acted_on():
    ours = from_fastvideo(first_full_step=3)
    assert [ours.layer(0, 30, step).dense for step in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.9}, "FastVideo's VMoBA JSON must have keys of .*, got 'sparsity': 0.9"),
        ({"temporal": 3}, "FastVideo's VMoBA JSON must have keys of .*, got 'temporal': 3"),
        ({"temporal_chunk_size": 0}, "temporal_chunk_size must be an int of at least 1, got 0"),
        ({"temporal_chunk_size": 2.0}, "temporal_chunk_size must be an int of at least 1, got 2.0"),
        ({"temporal_chunk_size": None}, "temporal_chunk_size must be an int of at least 1, got None"),
        ({"spatial_chunk_size": 4}, r"spatial_chunk_size must be a list of 2 ints .* \(height, width\), got 4"),
        ({"st_chunk_size": [4, 4]}, r"st_chunk_size must be a list of 3 ints .*, got \[4, 4\]"),
        ({"st_topk": 0}, "st_topk must be an int of at least 1, got 0"),
        ({"moba_select_mode": "top_k"}, r"moba_select_mode must be one of \('topk', 'threshold'\), got 'top_k'"),
        ({"moba_threshold": 1.5}, r"moba_threshold must be a number in \(0, 1\], got 1.5"),
        ({"moba_threshold": "0.5"}, r"moba_threshold must be a number in \(0, 1\], got '0.5'"),
        ({"moba_threshold_type": "head"}, "moba_threshold_type must be one of .*'overall'.*, got 'head'"),
        ({"first_full_layer": -1}, "first_full_layer must be an int of at least 0, got -1"),
        ({"first_full_step": 0.25}, "first_full_step must be an int of at least 0, got 0.25"),
        ({"st_layer": True}, "st_layer must be an int of at least 0, got True"),
        (
            {"temporal_layer": 0, "spatial_layer": 0, "st_layer": 0},
            r"temporal_layer \+ spatial_layer \+ st_layer must be at least 1, got 0",
        ),
        (
            {"moba_select_mode": "topk", "moba_threshold_type": "block"},
            "moba_threshold_type must not be 'block' where moba_select_mode is 'topk', got 'block'",
        ),
        (
            {"moba_select_mode": "topk", "spatial_topk": None},
            "spatial_topk must be given where moba_select_mode is 'topk', got None",
        ),
    ],
)
def test_bad_fastvideo_json(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        from_fastvideo(**changes)
