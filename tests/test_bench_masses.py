"""The benchmark of gates and masses, tried out on a CPU."""

import pytest

from bench.attention import masses
from vmoba_flex.rules import GATES


def test_a_small_run_times_each_gate_and_checks_its_scores():
    rows = masses.measure("cpu", small=True)
    assert all(row["ms"] > 0 for row in rows), rows
    errors = {row["call"]: row["error"] for row in rows if row["error"] is not None}
    assert {f"{gate}: scores" for gate in GATES} <= errors.keys()
    assert max(errors.values()) < 1e-5
    facts = {"command": "command", "device": "device", "date": "date", "versions": {"torch": "2"}}
    rows = [rows[0] | {"ms": 2.0}, {"call": "a", "ms": 1.0, "error": 1e-6}, {"call": "b", "ms": None, "failed": "no"}]
    text = masses.markdown(facts, rows)
    assert "| a | 1.00 | 0.500 | 1.0e-06 |" in text and "| b |" in text


@pytest.mark.parametrize("wrong", ["exact", "spread"])
def test_wrong_scores_are_seen(wrong: str, monkeypatch: pytest.MonkeyPatch):
    right = masses.gate_scores
    monkeypatch.setattr(masses, "gate_scores", lambda *args: right(*args) + (args[-1] == wrong))
    errors = {row["call"]: row["error"] for row in masses.measure("cpu", small=True)}
    assert errors[f"{wrong}: scores"] == pytest.approx(1)
