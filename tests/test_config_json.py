"""VMoBAConfig as JSON text and in files, and FastVideo's JSON."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import configs
from tests.test_config import PER_KIND, SMALL, config
from vmoba_flex import BySteps, Tail, Threshold, TopK, config_json
from vmoba_flex.config import KINDS, ApproxBlocks, VMoBAConfig

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


def from_json(data: object) -> VMoBAConfig:
    return VMoBAConfig.from_json(json.dumps(data))


def from_fastvideo(**changes: object) -> VMoBAConfig:
    return from_json(FASTVIDEO | changes)


def own(**changes: object) -> dict[str, object]:
    return json.loads(SMALL.to_json()) | changes


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
        '  "rule": {"spatial": {"k": 6, "pool": "query", "gate": "mean"}},',
    ]


def test_json_of_steps_is_readable():
    falling = BySteps({0: TopK(density=0.25), 0.5: TopK(1)})
    ours = config(rule=falling, tail=BySteps({0: None, 3: Tail((1, 2, 3))}))
    lines = ours.to_json().splitlines()
    assert lines[5] == (
        '  "rule": {"by_steps": [[0, {"density": 0.25, "pool": "query", "gate": "mean"}], '
        '[0.5, {"k": 1, "pool": "query", "gate": "mean"}]]},'
    )
    assert '  "tail": {"by_steps": [[0, null], [3, [1, 2, 3]]]},' in lines


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
        (
            own(spatial={"blocks": 2}),
            ValueError,
            r'spatial must be sizes or {"approx_blocks": count}, got {.blocks.: 2}',
        ),
        (own(spatial={}), ValueError, r'spatial must be sizes or {"approx_blocks": count}, got {}'),
        (own(temporal={"approx_blocks": 0}), ValueError, "temporal: count must be at least 1, got 0"),
        (own(temporal={"approx_blocks": "8"}), TypeError, "temporal: count must be an int, got '8'"),
        (own(rule=0.25), ValueError, "rule must be an object with 'tau', or with 'k' or 'density', got 0.25"),
        (own(rule={"tau": 1.5}), ValueError, r"tau must lie in \(0, 1\], got 1.5"),
        (own(rule={"k": 2.5}), TypeError, "k must be an int, got 2.5"),
        (own(rule={"k": 2, "gate": "average"}), ValueError, "gate must be one of .*'exact'.*, got 'average'"),
        (own(rule={"tau": 0.5, "k": 2}), ValueError, "rule must have keys of .*, got 'k': 2"),
        (own(rule={"topk": 2}), ValueError, "rule must have keys of .*, got 'topk': 2"),
        (own(rule={"1d": {"k": 2}}), ValueError, "rule must have keys of .*, got '1d'"),
        (
            own(rule={"spatial": {"k": 2, "tau": 0.5}}),
            ValueError,
            "rule of 'spatial' must have keys of .*, got 'k': 2",
        ),
        (own(rule={"by_steps": {"0": {"k": 2}}}), ValueError, r"rule must be {.by_steps.: \[\[start, .*, got {'by_"),
        (
            own(rule={"by_steps": [[0, {"k": 2}, 1]]}),
            ValueError,
            r'rule must be {"by_steps": \[\[start, value\], ...\]} where it changes by steps, got',
        ),
        (own(rule={"by_steps": [[0, 2]]}), ValueError, "rule from 0 must be an object with .*, got 2"),
        (
            own(rule={"by_steps": [["0", {"k": 2}]]}),
            TypeError,
            "rule: a start in entries .* must be a step .*, got '0'",
        ),
        (own(rule=[{"k": 2}, {"k": 2, "l": 3}]), ValueError, "rule of layer 1 must have keys of .*, got 'l': 3"),
        (own(remember=3), ValueError, "remember must be an object, got 3"),
        (own(remember={"every": 2}), ValueError, "remember must have keys of .*'refresh'.*, got 'every': 2"),
        (
            own(tail={"by_steps": []}),
            ValueError,
            r"tail: entries of BySteps must have 0 as their first start, got \[\]",
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
    with pytest.raises(TypeError, match=r"text must be a str of JSON, got b'{}': VMoBAConfig.load\(path\)"):
        VMoBAConfig.from_json(b"{}")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"temporal": ' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_nesting_is_refused(text: str):
    with pytest.raises(ValueError, match="text must be JSON that is not nested as deeply, got"):
        VMoBAConfig.from_json(text)


@pytest.mark.parametrize("digits", [21, 400, 5000])
def test_long_ints_are_refused(digits: int):
    with pytest.raises(ValueError, match=r"text must have ints of at most 20 digits, got 9{20}\.\.\.$"):
        VMoBAConfig.from_json(SMALL.to_json().replace('"temporal": 2', f'"temporal": {"9" * digits}'))


# Files


def test_save_and_load(tmp_path: Path):
    ours = config(dense_layers=[0, -1], dense_steps=(0.25, 1), rule=PER_KIND)
    for path in (tmp_path / "a.json", str(tmp_path / "a.json")):
        ours.save(path)
        assert VMoBAConfig.load(path) == ours
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_load_reads_fastvideo(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(FASTVIDEO))
    assert VMoBAConfig.load(tmp_path / "a.json") == from_json(FASTVIDEO)


@pytest.mark.parametrize("method", [SMALL.save, VMoBAConfig.load])
def test_a_path_is_a_path(method: Callable[[object], object]):
    with pytest.raises(TypeError, match="path must be a str or a Path, got 3"):
        method(3)


def test_bad_files(tmp_path: Path):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        "none.json": "cannot read .*none.json .*No such file",
        "text.json": "text.json is no VMoBAConfig .text must be JSON, got 'no JSON'",
        "bytes.json": "cannot read .*bytes.json",
    }.items():
        with pytest.raises(ValueError, match=words):
            VMoBAConfig.load(tmp_path / name)
    before = set(tmp_path.iterdir())
    for name, words in {"a.txt": "must end in .json, got .*a.txt", "none/a.json": "cannot write .*none/a.json"}.items():
        with pytest.raises(ValueError, match=words):
            SMALL.save(tmp_path / name)
    assert set(tmp_path.iterdir()) == before


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
def test_fastvideo_cycle_starts_after_the_dense_layers(runs: tuple[int, int, int], dense: int):
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
            r"temporal_layer \+ spatial_layer \+ st_layer must lie in 1..10000, got 0",
        ),
        ({"temporal_layer": 10**9}, r"temporal_layer .* must lie in 1..10000, got 1000000002"),
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
