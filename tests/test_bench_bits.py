"""bench.attention.bits: the same calls have the same hashes, and each call that changes is named."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.attention import bits

FEW = {"partitions": ("text",), "rules": ("topk", "threshold")}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return bits.bits("cpu", **FEW)


@pytest.mark.usefixtures("one_thread")
def test_the_same_calls_have_the_same_hashes(found: dict[str, str]):
    assert len(found) == 2 * 3 * 2 * (2 + len(bits.DISPATCHES))  # rules, dtypes, key heads, calls
    assert bits.differences(found, bits.bits("cpu", **FEW)) == []
    # Other rules and other key heads give other results.
    assert found["packed, text, topk, float32, 2 key heads"] != found["packed, text, threshold, float32, 2 key heads"]
    assert found["selection, text, topk, float64, 2 key heads"] != found["selection, text, topk, float64, 1 key heads"]


def test_one_bit_is_seen():
    x = torch.zeros(3)
    y = x.clone()
    y[1] = -0.0
    assert bits.digest(x) != bits.digest(y)
    assert bits.digest(x, x) != bits.digest(x)


def test_a_call_that_changed_or_came_or_went_is_named(monkeypatch, tmp_path: Path, capsys):
    before, after = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}
    assert bits.differences(before, after) == ["b", "c", "d"]
    file = tmp_path / "before.json"
    monkeypatch.setattr(bits, "bits", lambda device: before)
    monkeypatch.setattr(sys, "argv", ["bits", "--output", str(file)])
    assert bits.main() == 0
    assert json.loads(file.read_text()) == before
    monkeypatch.setattr(sys, "argv", ["bits", "--compare", str(file)])
    assert bits.main() == 0
    assert capsys.readouterr().out == "0 of 3 calls differ\n"
    monkeypatch.setattr(bits, "bits", lambda device: after)
    assert bits.main() == 1
    assert capsys.readouterr().out == "b\nc\nd\n3 of 3 calls differ\n"
