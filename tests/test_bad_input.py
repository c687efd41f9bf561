"""Bad values for everything in a config and on the command line: each names the argument and the value that it got."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_config import SMALL, config
from vmoba_flex import ApproxBlocks, Threshold, TopK, VMoBAConfig
from vmoba_flex.cli import main

NOT_INTS = [None, True, 1.0, "2", b"2", [2], (), {}, math.nan, 2j]
NOT_POSITIVE = [0, -1, -(2**63)]
Case = tuple[str, Callable[[Any], Any], Any]


def fields() -> Iterator[Case]:
    """Argument, what takes it, value."""

    def changing(name: str) -> Callable[[Any], Any]:
        return lambda value: config(**{name: value})

    for name, values in {
        "temporal": [*NOT_INTS, *NOT_POSITIVE],
        "spatial": [None, 2, "23", {2, 3}, (2,), (2, 3, 4), (0, 3), (2, -1), (2.0, 3), (True, 3), (None, 3), [[2, 3]]],
        "spatiotemporal": [None, 2, (1, 2), (1, 2, 3, 4), (1, 0, 3), (1, 2, 3.0), ("1", 2, 3), (False, 2, 3), ()],
        "rule": [None, 0.25, "head", [], {}, {"temporal": TopK(1)}, {"spatial": 3}, {1: TopK(1)}, TopK, (TopK(1), 3)],
        "cycle": [None, "spatial", (), [], ("2d",), ("spatial", None), (1,), {"spatial"}, ("Temporal",)],
        "dense_layers": [None, True, -1, 0.5, "1", {1}, [0.5], [True], ["0"], [None], b"01"],
        "dense_steps": [
            None, True, -1, -0.5, 1.0, 1.5, math.nan, math.inf, "1", [], [1], [1, 2, 3], (1, None), (1, -1), (0.5, 1.0),
            (0.7, 0.4), (True, 0), {1, 2}, (math.nan, 0),
        ],
        "dispatch": [None, "pakced", "", "AUTO", 1, True],
        "backend": [None, "cuda", "", "Triton", 1],
    }.items():  # fmt: skip
        for value in values:
            yield name, changing(name), value
    for value in ["infer", "", None, 3, "Training", True]:
        yield "setting", VMoBAConfig.paper, value
    for value in [
        "Wan2.1",
        3,
        2.5,
        {},
        (1, 2),
        (21, 30, 52, 1),
        (0, 30, 52),
        (21, -30, 52),
        (21.0, 30, 52),
        (True, 1, 1),
        (),
    ]:
        yield "grid", lambda value: VMoBAConfig.paper("inference", value), value
        yield "grid", lambda value: SMALL.partition("spatial", value), value
    for value in ["1d", None, "", 2]:
        yield "kind", lambda value: SMALL.partition(value, (2, 4, 4)), value
    for value in [None, 1.5, "1", True, -1]:
        yield "prefix", lambda value: SMALL.partition("spatial", (2, 4, 4), value), value
        yield "suffix", lambda value: SMALL.partition("spatial", (2, 4, 4), 0, value), value
    for value in [*NOT_INTS, *NOT_POSITIVE]:
        yield "count", ApproxBlocks, value
        yield "num_layers", lambda value: SMALL.layer(0, value), value
    for value in [*NOT_INTS, -1, 3]:
        yield "i", lambda value: SMALL.layer(value, 3), value
    for value in [True, 0.5, "0", -1, 4]:
        yield "step", lambda value: SMALL.layer(0, 3, value, 4), value
    for value in [True, 0.5, "0", 0, -1]:
        yield "num_steps", lambda value: SMALL.layer(0, 3, 0, value), value
    for value in [None, 3, b"x", [], 1.5]:
        yield "path", SMALL.save, value
        yield "path", VMoBAConfig.load, value
        yield "text", VMoBAConfig.from_json, value
    for value in ["", "{", "[]", "3", "null", "config.json", "{'a': 1}", '"text"']:
        yield "text", VMoBAConfig.from_json, value


def in_json() -> Iterator[Case]:
    """A key of a config's JSON, what takes it, value."""

    def changing(name: str) -> Callable[[Any], Any]:
        return lambda value: VMoBAConfig.from_json(json.dumps(json.loads(SMALL.to_json()) | {name: value}))

    for name, values in {
        "version": [0, 2, "1", None, True],
        "temporal": [
            "",
            [],
            {},
            None,
            "2",
            0,
            -1,
            1.5,
            True,
            {"about": 3},
            {"approx_blocks": 0},
            {"approx_blocks": "8"},
        ],
        "spatial": ["", [], {}, 3, [2], [2, 0], [2, 3, 4], [[2, 3]], {"approx_blocks": 1.5}, {"approx_blocks": None}],
        "spatiotemporal": ["", [], {}, 3, [1, 2], [1, 2, None], [1, 2, "3"], {"approx_blocks": [8]}],
        "rule": ["", [], None, 0.5, [{"tau": 0.5}, 3], "tau", True],
        "cycle": ["", [], None, "spatial", ["2d"], [None], [["spatial"]]],
        "dense_layers": ["", None, -1, 1.5, ["0"], True],
        "dense_steps": ["", None, -1, 1.0, [1], [1, 2, 3], [1, -2], [0.5, 0.5], True],
        "dispatch": ["", None, "pakced", 3],
        "backend": ["", None, "cuda", 3],
    }.items():
        for value in values:
            yield name, changing(name), value


@pytest.mark.parametrize(
    ("name", "call", "value"), [*fields(), *in_json()], ids=lambda part: "" if callable(part) else repr(part)
)
def test_a_bad_value_is_named(name: str, call: Callable[[Any], Any], value: Any):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(value)
    message = str(caught.value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    assert re.search(rf"\b{name}\b", message), message
    # The value as it stands, or the part of it that is wrong.
    assert any(words in message for part in [value, *parts] for words in {repr(part), str(part)}), message


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, options in {
            "demo": {"grid": ["8x18", "0x1x1", "axbxc", "8,18,32", ""], "query": ["1,2", "a,b,c", "1x2x3", "-1,0,0"]},
            "inspect x": {"rows": ["many", "1.5"], "seed": ["a"], "pool": ["haed"], "normalize": ["max"], "tau": ["a"]},
            "calibrate x": {"recall": ["most"], "density": ["a"], "rows": ["1.5"]},
            "plot x": {"what": ["all"], "layer": ["first"], "step": ["1.5"], "head": ["x"], "query": ["1,2,3,4"]},
            "bench": {
                "tokens": ["1k"],
                "heads": ["1.5"],
                "head-dim": [""],
                "dispatch": ["dense", "fast"],
                "density": ["a"],
            },
        }.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_a_malformed_word_is_named(command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), f"--{option}={value}"])
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"--{option}" in errors.splitlines()[-1] and repr(value) in errors.splitlines()[-1]


def test_there_are_many():
    assert len([*fields(), *in_json()]) > 250


@pytest.mark.parametrize("tau", [0, 1.5, math.nan, "0.5", None, True])
def test_a_rule_names_its_tau(tau: Any):
    with pytest.raises((TypeError, ValueError), match=re.escape(f"got {tau!r}")):
        Threshold(tau)


def test_a_folder_is_no_file(tmp_path: Path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*a\.json, which is a folder"):
        SMALL.save(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_share_in_place_of_a_count_is_pointed_to_density():
    with pytest.raises(TypeError, match=r"k must be an int, got 0.25: a share of the blocks is TopK\(density=0.25\)"):
        TopK(0.25)
