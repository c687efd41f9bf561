"""bench.distributed: a small run on CPUs, and the model of what a call costs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.distributed import cost
from tests.test_bench import ROOT


def test_a_small_run_checks_measures_and_predicts(tmp_path: Path):
    pytest.importorskip("diffusers")
    output = tmp_path / "small.json"
    options = ["--device", "cpu", "--small", "--gpus", "1,2", "--only", "packed", "--only", "dense | 576"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.distributed.run", "--output", output, *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    rows = {(row["model"], row["attention"], row["tail"], row["tokens"], row["gpus"]): row for row in report["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, result.stderr
    assert len(rows) == 2 * 7
    assert sum(tail for _, _, tail, _, _ in rows) == 2
    for (model, attention, tail, _, gpus), row in rows.items():
        assert row["difference"] == 0
        assert row["forward_backward_ms"] > 0 and row["forward_backward_speed_up"] > 0
        assert (row["density"] == 1) == (attention == "dense")
        if gpus > 1 and not model:
            for mode in ("forward", "forward_backward"):
                assert row[f"{mode}_compute_ms"] > 0 and row[f"{mode}_exchange_ms"] > 0
                assert tail or row[f"{mode}_predicted_ms"] > 0
    table = output.with_suffix(".md").read_text()
    assert "## Measured" in table and "## Predicted" in table and "1048576" in table


def row_of(attention: str, tokens: int, gpus: int, forward: float, backward: float, exchange: float = 0.0) -> dict:
    """A measured row; times in ms."""
    return {
        "status": "ok", "model": "", "attention": attention, "tokens": tokens, "gpus": gpus, "heads": 12,
        "head_dim": 128, "bytes_each": 2, "density": 0.2, "forward_ms": forward, "forward_backward_ms": backward,
        "forward_exchange_ms": exchange, "forward_backward_exchange_ms": 2 * exchange,
    }  # fmt: skip


def test_a_machine_is_found_in_rows_that_its_costs_made():
    rates = {("packed", "forward"): 4e14, ("packed", "forward_backward"): 3e14}
    per_token = {("packed", "forward"): 3e-9, ("packed", "forward_backward"): 8e-9}
    machine = cost.Machine(rates, per_token, link=200e9, latency=0.0)
    rows = []
    for tokens in (55296, 110592, 221184):
        for gpus in (1, 2, 4):
            call = cost.Call(tokens, 12, 128, 0.2, "packed")
            forward, backward = (1e3 * cost.predict_s(call, gpus, mode, machine) for mode in cost.MODES)
            rows.append(row_of("packed", tokens, gpus, forward, backward))
            rows[-1]["forward_exchange_ms"] = 1e3 * cost.exchange_s(call, gpus, "forward", machine)
    found = cost.fit(rows, latency=0.0)
    assert found.link == pytest.approx(machine.link)
    assert dict(found.rates) == pytest.approx(rates) and dict(found.tokens) == pytest.approx(per_token)
    for row in rows:
        for mode in cost.MODES:
            assert 1e3 * cost.predict_s(cost.call_of(row), row["gpus"], mode, found) == pytest.approx(row[f"{mode}_ms"])


def test_costs_by_hand():
    call = cost.Call(1000, 12, 128, 0.5, "packed")
    assert cost.work(call, "forward") == 4 * 1000**2 * 12 * 128 * 0.5
    assert cost.share(call, 4) == 3 / 12
    assert cost.share(call, 8) == 2 / 12  # four ranks have two heads, four have one
    assert cost.share(call, 64) == 1 / 64
    whole = 1000 * 12 * 128 * 2
    assert cost.sent(call, 4, "forward") == 4 * whole / 4 * 3 / 4
    assert cost.sent(call, 64, "forward_backward") == 4 * whole / 64 * 63
    machine = cost.Machine({}, {}, link=1e9, latency=0.0, network=1e8)
    assert cost.exchange_s(call, 1, "forward", machine) == 0
    assert cost.exchange_s(call, 8, "forward", machine) == cost.sent(call, 8, "forward") / 1e9
    outside = 9 / 16  # of 16 others, 7 are in the node
    expected = cost.sent(call, 17, "forward") * ((1 - outside) / 1e9 + outside / 1e8)
    assert cost.exchange_s(call, 17, "forward", machine) == pytest.approx(expected)


def test_rows_that_are_missing():
    with pytest.raises(ValueError, match="rows must have one on one GPU, got none"):
        cost.fit([row_of("packed", 55296, 2, 5.0, 15.0, 1.0)])
    # One row gives a rate, and no time for tokens.
    found = cost.fit([row_of("packed", 55296, 1, 5.0, 15.0)])
    assert found.tokens["packed", "forward"] == 0
    assert cost.predict_s(cost.Call(55296, 12, 128, 0.2, "packed"), 1, "forward", found) == pytest.approx(5e-3)
    # However many GPUs, a call of ours takes its launches.
    for attention, floor in (("packed", found.launches["packed", "forward"]), ("dense", 0.0)):
        rates, tokens = {(attention, "forward"): 1e30}, {(attention, "forward"): 0.0}
        machine = dataclasses.replace(found, rates=rates, tokens=tokens)
        call = cost.Call(128, 12, 128, 0.2, attention)
        assert cost.predict_s(call, 4, "forward", machine) == max(floor, cost.exchange_s(call, 4, "forward", machine))
