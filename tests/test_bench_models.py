"""bench.models: small runs on the CPU, their file and table, and rows that fail or lie."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.models import rows as model_rows
from bench.models import setup, shapes, tables, worker
from bench.models.report import ModelReport
from bench.models.run import parse
from tests.test_bench import ROOT
from vmoba_flex import Tail, Threshold, TopK
from vmoba_flex.models import apply_vmoba

pytest.importorskip("diffusers")
MODES = ("training step, checkpointing", "training step", "inference forward")


def run(output: Path, *options: str) -> str:
    """Runs the command with small models; returns what it printed."""
    command = [sys.executable, "-m", "bench.models.run", "--output", str(output), "--device", "cpu", "--small"]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def rows_of(output: Path) -> dict[str, dict]:
    """Rows by mode and attention."""
    return {f"{row['mode']}, {row['attention']}": row for row in json.loads(output.read_text())["rows"]}


def test_small_run_measures_every_mode_and_attention(tmp_path: Path):
    output = tmp_path / "small.json"
    # Every attention in one mode, and one of ours in the others.
    of_training = [f"training step,| {name}" for name in ("SDPA", "exact, packed", "none")]
    printed = run(output, *(word for each in (*of_training, "inference") for word in ("--only", f"Wan 1.3B,{each}")))
    report = json.loads(output.read_text())
    assert report["runs"][0]["versions"]["diffusers"]
    assert "say nothing about the quality" in report["formulas"]["weights"]
    assert str(tmp_path) not in output.read_text()
    rows = rows_of(output)
    tailed = [f"{name}, density 0.125 + tail" for name in ("exact", "shared")]
    lowest = [f"{name}, density 0.0625 + tail" for name in ("exact", "shared")]
    trained = ("SDPA", "exact, packed", "none")
    forward = {f"{MODES[2]}, {name}" for name in (*trained, "exact", "shared", *tailed, *lowest)}
    assert rows.keys() == forward | {f"{mode}, {name}" for mode in MODES[:2] for name in trained}
    for row in rows.values():
        assert row["status"] == "ok", printed
        assert row["ms"] == row["parts"][0]["ms"] > 0
        if row["attention"] == "none":
            assert "speed_up" not in row
            continue
        assert row["dense_error"] <= row["dense_budget"] < 1e-5
        assert row["compiled_error"] < 1e-5
        assert row["speed_up"] == rows[f"{row['mode']}, SDPA"]["ms"] / row["ms"]
        assert row["attention_share"] == 1 - rows[f"{row['mode']}, none"]["ms"] / row["ms"]
        if row["attention"] != "SDPA":
            assert 0 < row["density"] < 1 and row["difference"] > 10 * row["dense_budget"]
            assert row["blocks"]["temporal"]["count"] == 2
            tail = "tail" in row["attention"]
            assert ("TopK" in row["rule"]) == (row["mode"] == "inference forward" or tail)
            assert row["tail"] == "Tail(cell=64)" * tail
            assert not tail or f"density={row['attention'].split()[2]}," in row["rule"]
    table = output.with_suffix(".md").read_text()
    assert all(f"## {mode}" in table for mode in MODES)
    assert table.count("| Wan 1.3B, 3 layers | 72 |") == len(rows)

    # Another run keeps what is there, and may compile ahead.
    printed = run(output, "--only", "Wan 14B,inference,SDPA", "--add", "--compile-ahead-s", "60")
    *kept, added = json.loads(output.read_text())["rows"]
    assert kept == report["rows"]
    assert (added["model"], added["status"]) == ("Wan 14B", "ok")
    assert "compiling ahead" not in printed  # says no error


def test_gpus_share_the_rows(tmp_path: Path):
    output = tmp_path / "small.json"
    rows_to_run = ("Wan,inference,SDPA", "HunyuanVideo,inference,SDPA", "HunyuanVideo,inference,none")
    printed = run(output, "--gpus", "2", *(word for row in rows_to_run for word in ("--only", row)))
    report = json.loads(output.read_text())
    rows = {(row["model"], row["attention"]): row for row in report["rows"]}
    assert len(rows) == 4 and {row["status"] for row in rows.values()} == {"ok"}, printed
    sdpa, none = rows["HunyuanVideo", "SDPA"], rows["HunyuanVideo", "none"]  # so short that either may win
    assert sdpa["attention_share"] == pytest.approx(1 - none["ms"] / sdpa["ms"])
    assert {path.name for path in tmp_path.iterdir()} == {"small.json", "small.md"}
    (one,) = report["runs"]  # the same device and command
    assert one["command"].endswith("--device cpu --small --gpus 2") and "_gpu" not in one["command"]


@pytest.mark.parametrize(("model", "grid"), shapes.SMALL.more, ids=lambda x: getattr(x, "name", ""))
def test_models_with_a_grid_of_their_own_run(model: shapes.Model, grid: tuple[int, int, int]):
    built = model.build(model.parts[0], "cpu", torch.float32)
    inputs = model.inputs(grid, "cpu", torch.float32)
    with apply_vmoba(built, shapes.SMALL.config(grid, False, "packed")) as handle, torch.no_grad():
        assert built(**inputs)[0].isfinite().all()
        assert f"grid {'x'.join(map(str, grid))}" in handle.summary() and handle.summary().count("sparse") == 3


def test_every_row_has_one_share_and_shapes_stay_together():
    rows = list(model_rows.specs(shapes.FULL, "cuda"))
    shares = [model_rows.shared_out(rows, index, 4) for index in range(4)]
    assert sorted(row.id for share in shares for row in share) == sorted(row.id for row in rows)
    kept = [{(row.model.name, row.grid) for row in share} for share in shares]
    assert sum(map(len, kept)) == len(set.union(*kept))
    assert [share[0].tokens for share in shares] == [55_296, 32_760, 13_440, 75_600]


def test_times_of_a_few_layers_are_scaled_to_the_whole_model(tmp_path: Path):
    output = tmp_path / "small.json"
    printed = run(output, "--only", "HunyuanVideo,inference,SDPA", "--only", "HunyuanVideo,inference,| shared")
    rows = rows_of(output).values()
    assert [row["attention"] for row in rows] == ["SDPA", "shared", "shared, density 0.125 + tail"]
    for row in rows:
        assert row["status"] == "ok", printed
        dual, single = row["parts"]
        assert (dual["layers"], dual["of"], single["layers"], single["of"]) == (3, 6, 3, 9)
        assert row["ms"] == pytest.approx(2 * dual["ms"] + 3 * single["ms"])
        if row["attention"] != "SDPA":
            assert row["density"] == pytest.approx((6 * dual["density"] + 9 * single["density"]) / 15)
    assert "HunyuanVideo, 3 for 6 + 3 for 9 layers" in output.with_suffix(".md").read_text()


def test_rows_that_fail_or_lie_are_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):

    def apply(model, config):
        if config.dispatch == "auto":
            raise torch.OutOfMemoryError("tried to allocate 137 GiB")
        model.register_forward_hook(lambda module, inputs, output: (output[0] * 1.001,))
        return SimpleNamespace(remove=lambda: None, set_enabled=lambda enabled: None)

    monkeypatch.setattr(setup, "apply_vmoba", apply)
    output = tmp_path / "x.json"
    only = ["--only", "Wan 1.3B,inference"]
    arguments = ["--device", "cpu", "--small", *only, "--output", str(output)]
    assert worker.work(parse(arguments)) == 0
    rows = {row["attention"]: row for row in json.loads(output.read_text())["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "SDPA": "ok",
        "exact": "out of memory",
        "shared": "wrong",
        "none": "ok",
        "exact, packed": "wrong",
        **{f"exact, density {density} + tail": "out of memory" for density in (0.125, 0.0625)},
        **{f"shared, density {density} + tail": "wrong" for density in (0.125, 0.0625)},
    }
    assert rows["shared"]["error"].startswith("full attention differs from the stock model's by 0.001")
    assert "ms" not in rows["shared"]


def test_a_new_run_tries_again_what_failed_of_the_rows_it_is_asked_for(tmp_path: Path):
    row = {"mode": MODES[0], "model": "Wan", "dense": True, "attention": "SDPA", "parts": [{"layers": 1, "of": 1}]}
    kept = ModelReport(tmp_path / "x.json")
    kept.start_run({"device": "a GPU", "date": "today", "versions": {}, "command": "a command"})
    for tokens in (72, 144):
        name = f"Wan | {tokens} tokens"
        kept.rows[name] = row | {"id": name, "tokens": tokens, "status": "out of memory", "error": "too much", "run": 0}
    kept.save()
    ModelReport.begin(kept.path, add=True, only=["Wan,144 tokens"])
    statuses = {row["tokens"]: row["status"] for row in ModelReport.load(kept.path).rows.values()}
    assert statuses == {72: "out of memory", 144: "not run"}


def test_a_part_still_compiled_is_not_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    built = []

    def build(spec: model_rows.Spec, part: shapes.Part, *rest: Any) -> setup.Setup:
        built.append(part.of)
        return setup.Setup(spec, part, *rest)

    monkeypatch.setattr(worker, "Setup", build)
    output, grids = tmp_path / "x.json", (*[(3, 4, 6)], *[(2, 4, 6)] * 4)
    sizes = shapes.SMALL
    monkeypatch.setattr(worker, "SMALL", worker.dataclasses.replace(sizes, grids=grids))
    only = ["--only", "HunyuanVideo,72 tokens,training,SDPA"]
    arguments = ["--device", "cpu", "--small", *only, "--output", str(output)]
    assert worker.work(parse(arguments)) == 0
    assert built == [6, 9, 6]  # with checkpointing first the dual layers; without, first the single ones
    for row in rows_of(output).values():
        assert row["status"] == "ok"
        assert row["ms"] == pytest.approx(2 * row["parts"][0]["ms"] + 3 * row["parts"][1]["ms"])


def test_no_row_starts_without_budget(tmp_path: Path):
    output = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--small", "--output", str(output), "--budget-s", "-1"]
    assert worker.work(parse(arguments)) == 0
    assert {row["status"] for row in json.loads(output.read_text())["rows"]} == {"not run"}


def test_all_rows_are_there_and_the_goals_come_first():
    specs = list(model_rows.specs(shapes.FULL, "cuda"))
    assert len({spec.id for spec in specs}) == len(specs)
    ids = {spec.id for spec in specs}
    for model in shapes.FULL.models:
        for tokens in (13_440, 32_760, 55_296, 75_600, 110_592):
            for mode in MODES:
                tailed = [spec.name for spec in model_rows.TAILED]
                for attention in ("cuDNN", "FlashAttention-4", "exact", "shared", "none", *tailed):
                    assert f"{model.name} | {tokens} tokens | {mode} | {attention}" in ids
    assert [(spec.tokens, spec.mode, spec.attention.name) for spec in specs[:3]] == [
        (55_296, MODES[0], name) for name in ("cuDNN", "exact", "shared")
    ]
    assert {spec.model.name for spec in specs[:18]} == {"Wan 1.3B"}


def test_tables_of_pages_have_a_column_for_a_tail_where_one_was_measured():
    rows = [
        {"model": "Wan 1.3B", "mode": MODES[2], "tokens": 75_600, "status": "ok", "attention": name, "ms": ms}
        for name, ms in (("cuDNN", 2000.0), ("exact", 1000.0), ("shared, density 0.125 + tail", 500.0))
    ]
    assert tables.wan({"rows": rows[:2]})[0].endswith("| exact s | shared s | peak GB |")
    head, _, line = tables.wan({"rows": rows})
    assert head.endswith("| exact s | shared s | shared, density 0.125 + tail s | peak GB |")
    assert "| 1.00 (2.00x) |  | 0.50 (4.00x) |" in line


def test_the_models_have_their_real_sizes():
    sizes = []
    for model in shapes.FULL.models:
        for part in model.parts:
            built = model.build(part, "meta", torch.bfloat16)
            count = sum(x.numel() for x in built.parameters())
            blocks = [
                getattr(built, name, ()) for name in ("blocks", "transformer_blocks", "single_transformer_blocks")
            ]
            layers = sum(x.numel() for modules in blocks for block in modules for x in block.parameters())
            sizes.append((count - layers + layers * part.of / part.layers) / 1e9)
    wan, large, dual, single = sizes
    assert wan == pytest.approx(1.42, abs=0.01)
    assert large == pytest.approx(14.3, abs=0.1)
    assert dual + single == pytest.approx(12.8, abs=0.4)


def test_the_paper_s_blocks_are_taken_where_it_has_them():
    assert Threshold(0.25, max_density=0.25) == shapes.TRAINING_RULE
    assert TopK(density=0.25) == shapes.INFERENCE_RULE
    full = shapes.FULL
    config = full.config((24, 36, 64), True, "shared")
    assert (config.temporal, config.spatial, config.spatiotemporal) == (3, (6, 8), (8, 12, 8))
    assert config.dispatch == "shared" and config.rule == shapes.TRAINING_RULE
    low = full.config((21, 45, 80), True, "shared", 0.125, True)
    assert (low.rule, low.tail, low.spatiotemporal) == (TopK(density=0.125), Tail(), (7, 15, 20))
    other = full.config((32, 48, 72), False, "auto")
    assert [other.partition(kind, (32, 48, 72)).num_blocks for kind in other.cycle] == [8, 48, 72]
    assert other.rule == shapes.INFERENCE_RULE and other.dense_steps == 0
